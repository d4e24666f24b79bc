"""Targets are read off a result: each is met, or missed and said to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from bench import Result, schema
from bench.providers import AUTOGRAD, COMPILED, LEAN, OURS, OURS_CHUNK, THEIRS, THEIRS_CHUNK


class Target(NamedTuple):
    """At least (``≥``) or at most (``≤``) ``goal``; ``read`` finds the number in a result."""

    name: str
    sign: str
    goal: float
    read: Callable[..., float]


def verdicts(targets: Iterable[Target], result: Result, *backend: str) -> list[Result]:
    """Every target with what was measured (None: it was not) and whether that meets it.

    Args:
        targets: :data:`CPU`, or those of a backend in :data:`GPU`.
        result: that they are read off.
        backend: on a GPU, whose number is meant.
    """
    rows = []
    for name, sign, goal, read in targets:
        try:
            found = read(result, *backend)
        except (KeyError, TypeError):  # not asked, or its step did not get that far
            found = None
        met = None if found is None else found >= goal if sign == "≥" else found <= goal
        rows.append({"target": name, "goal": f"{sign} {goal:g}", "measured": found, "met": met})
    return rows


# --- on a CPU: results of pytest-benchmark, and of the questions ----------------------------------


def ratio(result: Result, case: str, kind: str, other: str, mine: str = OURS.name) -> float:
    """How many times as long ``other`` takes."""
    ms = schema.layers(result["speed"])[case][kind]
    return ms[other]["median"] / ms[mine]["median"]


def _growth(result: Result, kind: str) -> float:
    """The ratio at T=1024, the longest that both are timed at, over that at a quarter of it."""
    long, short = (ratio(result, f"T={t}", kind, THEIRS.name) for t in (1024, 256))
    return long / short


def _added(result: Result, share: str) -> float:
    return 100 * float(result["questions"]["overhead"]["Qwen2-Audio"][share])


def _one_thread(result: Result, kind: str, other: str, mine: str = OURS.name) -> float:
    """How many times as long ``other`` takes on the base case, in CPU time of one thread."""
    ms = result["questions"]["thread"]["base"]
    return float(ms[other][kind]["median"] / ms[mine][kind]["median"])


def _write(result: Result) -> float:
    ms = result["questions"]["thread"]["write"]
    return float(ms["reference"]["median"] / ms["auto"]["median"])


def _per_token(result: Result, kind: str) -> float:
    """Time of a token in 16,384 over that of one in 1,024."""
    ms = {int(n): x[kind]["median"] for n, x in result["questions"]["thread"]["lengths"].items()}
    return float(ms[16384] / 16 / ms[1024])


def _both(name: str, forward: float, both: float, **options: Any) -> list[Target]:
    """Times another provider on the base case: on two threads by the wall, on one by CPU time."""
    found = []
    for threads, read in (("", partial(ratio, case="base")), (", one thread", _one_thread)):
        for kind, goal in (("forward", forward), ("forward_backward", both)):
            of = partial(read, kind=kind, **options)
            title = "forward" if kind == "forward" else "forward and backward"
            found.append(Target(f"{title}, times {name}{threads}", "≥", goal, of))
    return found


_base = partial(ratio, case="base", other=THEIRS.name)
CPU = (
    *_both("titans-pytorch (T=512)", 150, 100, other=THEIRS.name),
    *_both("torch.compile of the closed form", 2, 2, other=COMPILED.name),
    *_both("torch.compile of the lean closed form", 1.5, 1.8, other=LEAN.name),
    *_both("autograd per chunk, chunk steps", 3, 3, other=AUTOGRAD.name, mine=OURS_CHUNK.name),
    Target("forward ratio, T=1024 over T=256", "≥", 1, partial(_growth, kind="forward")),
    Target(
        "forward and backward ratio, likewise", "≥", 1, partial(_growth, kind="forward_backward")
    ),
    Target(
        "forward, times its chunk-gate mode",
        *("≥", 2, partial(_base, kind="forward", other=THEIRS_CHUNK.name)),
    ),
    Target(
        "decode of one token, times titans-pytorch",
        *("≥", 25, partial(_base, kind="forward", case="decode")),
    ),
    Target("write of a turn of 112 tokens, times the portable backend", "≥", 3, _write),
    *(
        Target(
            f"{title}, time of a token in 16,384 over one in 1,024",
            *("≤", 1.1, partial(_per_token, kind=kind)),
        )
        for title, kind in (("forward", "forward"), ("forward and backward", "forward_backward"))
    ),
    Target(
        "% added to the prefill of a narrow Qwen2-Audio",
        *("≤", 6, partial(_added, share="share_of_prefill")),
    ),
    Target("% added to its decode", "≤", 1, partial(_added, share="share_of_decode")),
)


# --- on one H200: the result of a GPU session -----------------------------------------------------


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


def _batch_growth(result: Result, backend: str, step: str) -> float:
    return _latency(result, backend, step, 32) / _latency(result, backend, step)


def _bandwidth(result: Result, backend: str, case: str) -> float:
    """Share of the measured bandwidth of a copy."""
    found = result["timings"][case]["gigabytes_per_s"][backend]
    return float(found / result["ceilings"]["gigabytes_per_s"])


def _memory(result: Result, backend: str) -> float:
    train = result["timings"]["train"]
    return float(train["peak_bytes"][backend] / train["saved_state_bytes"])


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
    """Targets of a training shape."""
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


GPU = {
    "triton": (
        *_rates("", "train", 0.35, 0.25),
        *_faster("titans-pytorch", 100, "peer", "titans-pytorch"),
        *_faster("torch.compile", 4, "closed form", "torch.compile"),
        Target("read of a turn, µs", "≤", 40, partial(_latency, step="read_hidden")),
        Target("write of a turn, µs", "≤", 80, partial(_latency, step="write")),
        Target("read of 32 turns, times one", "≤", 2, partial(_batch_growth, step="read_hidden")),
        Target("write of 32 turns, times one", "≤", 2, partial(_batch_growth, step="write")),
        Target("peak memory over the saved states", "≤", 1.5, _memory),
    ),
    "cuda": (
        *_rates("", "train", 0.55, 0.40),
        *_rates("memory_update: ", "train writes", 0.55, 0.40),
        *_faster("Triton, one dialogue of 8 heads", 3, "one dialogue", "triton"),
        Target("read and write of a turn, µs", "≤", 60, partial(_latency, step="turn")),
        Target("scan, share of the copy bandwidth", "≥", 0.85, partial(_bandwidth, case="scan")),
        Target("long scan, likewise", "≥", 0.85, partial(_bandwidth, case="long scan")),
    ),
}
