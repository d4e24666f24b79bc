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


def _work_rate(result: Result, kind: str, forwards: int) -> float:
    """Share of the measured matmul rate; backward counts as two forwards, recomputation as none."""
    work = forwards * result["timings"]["train"]["forward_tflop"]
    per_second = 1e3 * work / _median(result, "train", "triton", kind)
    return per_second / float(result["ceilings"]["tflops"])


def _times(result: Result, case: str, other: str, kind: str) -> float:
    return _median(result, case, other, kind) / _median(result, case, "triton", kind)


def _latency(result: Result, step: str, dialogues: int = 1) -> float:
    """Microseconds under CUDA-graph replay."""
    return 1e3 * _median(result, f"{step} ×{dialogues}", "triton, graph")


def _growth(result: Result, step: str) -> float:
    return _latency(result, step, 32) / _latency(result, step)


def _memory(result: Result) -> float:
    train = result["timings"]["train"]
    return float(train["peak_bytes"]["triton"] / train["saved_state_bytes"])


class Target(NamedTuple):
    """``sign`` is ``≥`` or ``≤``; ``read`` finds the number among the results."""

    name: str
    sign: str
    goal: float
    read: Callable[[Result], float]


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


TARGETS = (
    Target(
        "forward, share of the bf16 matmul rate",
        *("≥", 0.35, partial(_work_rate, kind="forward_ms", forwards=1)),
    ),
    Target(
        "forward+backward, likewise",
        *("≥", 0.25, partial(_work_rate, kind="forward_backward_ms", forwards=3)),
    ),
    *_faster("titans-pytorch", 100, "peer", "titans-pytorch"),
    *_faster("torch.compile", 4, "closed form", "torch.compile"),
    Target("read of a turn, µs", "≤", 40, partial(_latency, step="read_hidden")),
    Target("write of a turn, µs", "≤", 80, partial(_latency, step="write")),
    Target("read of 32 turns, times one", "≤", 2, partial(_growth, step="read_hidden")),
    Target("write of 32 turns, times one", "≤", 2, partial(_growth, step="write")),
    Target("peak memory over the saved states", "≤", 1.5, _memory),
)


def targets(result: Result) -> list[dict[str, Any]]:
    """Every target with what was measured (None: it was not) and whether that meets it."""
    rows = []
    for name, sign, goal, read in TARGETS:
        try:
            found = None if result["environment"]["dry_run"] else read(result)
        except (KeyError, TypeError):  # its step did not get that far
            found = None
        met = None if found is None else found >= goal if sign == "≥" else found <= goal
        rows.append(dict(target=name, goal=f"{sign} {goal:g}", measured=found, met=met))
    return rows


def measured(result: Result) -> list[dict[str, Any]]:
    """Entries of ``mal_kernels/ops/measured.json``: where Triton is right and faster throughout."""
    environment, entries = result["environment"], []
    for row in result["timings"].values():
        kinds = [row[k] for k in ("forward_ms", "forward_backward_ms") if k in row]
        if not kinds or not all({"triton", "reference"} <= set(ms) for ms in kinds):
            continue
        speedup = [ms["reference"]["median"] / ms["triton"]["median"] for ms in kinds]
        passed = result.get("parity", {}).get(row["op"], {"passed": 0, "failed": []})
        if passed["passed"] and not passed["failed"] and min(speedup) > 1:
            same = {name: row[name] for name in ("op", "dtype", "features", "tokens")}
            entries.append(
                same
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
    goals = Table("target (one H200, bf16)", "goal", "measured", "", title="Targets")
    for row in result["targets"]:
        found = "not measured" if row["measured"] is None else f"{row['measured']:.2f}"
        word = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}[row["met"]]
        goals.add_row(row["target"], row["goal"], found, word)
    console.print(goals)


def _cells(result: Result) -> Iterator[tuple[str, str, list[str]]]:
    for case, row in result["timings"].items():
        forward, both = row.get("forward_ms", {}), row.get("forward_backward_ms", {})
        for provider in forward:
            ms = [f"{kind[provider]['median']:.4g}" if kind else "" for kind in (forward, both)]
            peak = row.get("peak_bytes", {}).get(provider)
            yield case, provider, [*ms, f"{peak / 2**30:.1f}" if peak else ""]
        for provider, why in row.get("unable", {}).items():
            yield case, provider, [why, "", ""]
