"""What the results of a GPU session say: targets met or missed, what ``auto`` may use, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]


def _median(result: Result, case: str, provider: str, kind: str = "forward_ms") -> float:
    return float(result["timings"][case][kind][provider]["median"])


def _work_rate(result: Result, backend: str, case: str, kind: str, forwards: int) -> float:
    """Share of the measured matmul rate; backward counts as two forwards, recomputation as none."""
    work = forwards * result["timings"][case]["forward_tflop"]
    per_second = 1e3 * work / _median(result, case, backend, kind)
    return per_second / float(result["ceilings"]["tflops"])


def _times(result: Result, backend: str, case: str, other: str, kind: str = "forward_ms") -> float:
    return _median(result, case, other, kind) / _median(result, case, backend, kind)


def _latency(result: Result, backend: str, step: str, dialogues: int = 1) -> float:
    """Microseconds under CUDA-graph replay."""
    return 1e3 * _median(result, f"{step} ×{dialogues}", f"{backend}, graph")


def _growth(result: Result, backend: str, step: str) -> float:
    return _latency(result, backend, step, 32) / _latency(result, backend, step)


def _bandwidth(result: Result, backend: str, case: str) -> float:
    """Share of the measured bandwidth of a copy."""
    found = result["timings"][case]["gigabytes_per_s"][backend]
    return float(found / result["ceilings"]["gigabytes_per_s"])


def _memory(result: Result, backend: str) -> float:
    train = result["timings"]["train"]
    return float(train["peak_bytes"][backend] / train["saved_state_bytes"])


class Target(NamedTuple):
    """``sign`` is ``≥`` or ``≤``; ``read`` finds a backend's number among the results."""

    name: str
    sign: str
    goal: float
    read: Callable[[Result, str], float]


def _faster(name: str, goal: float, case: str, other: str) -> list[Target]:
    """Forward, and forward and backward, at least ``goal`` times as fast as ``other``."""
    return [
        Target(
            f"{kind}, times {name}", "≥", goal, partial(_times, case=case, other=other, kind=field)
        )
        for kind, field in (
            ("forward", "forward_ms"),
            ("forward+backward", "forward_backward_ms"),
        )
    ]


def _rates(what: str, case: str, forward: float, both: float) -> list[Target]:
    """Of a training shape."""
    return [
        Target(
            f"{what}forward, share of the bf16 matmul rate",
            *("≥", forward, partial(_work_rate, case=case, kind="forward_ms", forwards=1)),
        ),
        Target(
            f"{what}forward+backward, likewise",
            *("≥", both, partial(_work_rate, case=case, kind="forward_backward_ms", forwards=3)),
        ),
    ]


TARGETS = {
    "triton": (
        *_rates("", "train", 0.35, 0.25),
        *_faster("titans-pytorch", 100, "peer", "titans-pytorch"),
        *_faster("torch.compile", 4, "closed form", "torch.compile"),
        Target("read of a turn, µs", "≤", 40, partial(_latency, step="read_hidden")),
        Target("write of a turn, µs", "≤", 80, partial(_latency, step="write")),
        Target("read of 32 turns, times one", "≤", 2, partial(_growth, step="read_hidden")),
        Target("write of 32 turns, times one", "≤", 2, partial(_growth, step="write")),
        Target("peak memory over the saved states", "≤", 1.5, _memory),
    ),
    "cuda": (
        *_rates("", "train", 0.55, 0.40),
        *_rates("memory_update: ", "train writes", 0.55, 0.40),
        *_faster("Triton, one dialogue of 8 heads", 3, "one dialogue", "triton"),
        Target("read and write of a turn, µs", "≤", 60, partial(_latency, step="turn")),
        Target("scan, share of the copy bandwidth", "≥", 0.85, partial(_bandwidth, case="scan")),
        Target("long scan, likewise", "≥", 0.85, partial(_bandwidth, case="long scan")),
        # not installed anywhere yet: reported as not measured
        Target(
            "without gates, times ThunderKittens TTT-MLP",
            *("≥", 1.5, partial(_times, case="no gates", other="ThunderKittens TTT-MLP")),
        ),
    ),
}


def targets(result: Result) -> list[dict[str, Any]]:
    """Every target with what was measured (None: it was not) and whether that meets it."""
    rows = []
    for backend, target in ((b, t) for b, all_of in TARGETS.items() for t in all_of):
        try:
            found = None if result["environment"]["dry_run"] else target.read(result, backend)
        except (KeyError, TypeError):  # its step did not get that far
            found = None
        name, sign, goal, _ = target
        met = None if found is None else found >= goal if sign == "≥" else found <= goal
        row = dict(backend=backend, target=name, goal=f"{sign} {goal:g}", measured=found, met=met)
        rows.append(row)
    return rows


def measured(result: Result) -> list[dict[str, Any]]:
    """Entries of ``mal_kernels/ops/measured.json``: where a backend is right and faster throughout.

    Triton than the reference, CUDA than both. What has failed a sanitizer is not right, whenever
    that ran.
    """
    environment, entries = result["environment"], []
    failed = result.get("failed", ())
    for backend, rivals in (("triton", ["reference"]), ("cuda", ["reference", "triton"])):
        parity = result.get("parity", {}).get(backend, {})
        for row in result["timings"].values():
            kinds = [
                row[k] for k in ("forward_ms", "forward_backward_ms") if backend in row.get(k, ())
            ]
            passed = parity.get(row["op"], {"passed": 0})["passed"]
            right = passed and f"{backend} {row['op']}" not in failed
            if not right or not kinds or not all("reference" in ms for ms in kinds):
                continue
            least = [min(ms[r]["median"] for r in rivals if r in ms) for ms in kinds]
            mine = [ms[backend]["median"] for ms in kinds]
            if all(a < b for a, b in zip(mine, least, strict=True)):
                speedup = [ms["reference"]["median"] / m for ms, m in zip(kinds, mine, strict=True)]
                same = {name: row[name] for name in ("op", "dtype", "features", "tokens")}
                entries.append(
                    {"backend": backend}
                    | same
                    | {name: environment[name] for name in ("architecture", "device", "commit")}
                    | {"speedup": [round(x, 2) for x in speedup]}
                )
    return entries


def show(console: Console, result: Result) -> None:
    """Times and targets as tables."""
    table = Table("case", "provider", "forward", "forward+backward", "peak GiB", title="ms, median")
    for case, provider, cells in _cells(result):
        table.add_row(case, provider, *cells)
    console.print(table)
    for case, row in result["timings"].items():
        for provider, why in (row.get("unable", {}) | row.get("wrong", {})).items():
            console.print(f"{case}, {provider}: {why}", highlight=False)
    goals = Table("backend", "target (one H200)", "goal", "measured", "", title="Targets")
    for row in result["targets"]:
        found = "not measured" if row["measured"] is None else f"{row['measured']:.2f}"
        word = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}[row["met"]]
        goals.add_row(row["backend"], row["target"], row["goal"], found, word)
    console.print(goals)


def _cells(result: Result) -> Iterator[tuple[str, str, list[str]]]:
    for case, row in result["timings"].items():
        forward, both = row.get("forward_ms", {}), row.get("forward_backward_ms", {})
        for provider in forward:
            found = [kind.get(provider, {}).get("median") for kind in (forward, both)]
            ms = ["" if x is None else f"{x:.4g}" for x in found]
            peak = row.get("peak_bytes", {}).get(provider)
            yield case, provider, [*ms, f"{peak / 2**30:.1f}" if peak else ""]
