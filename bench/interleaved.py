"""Rivals are timed in turns, because a shared machine has slow minutes.

pytest-benchmark times one function after the other: whoever runs in a slow minute loses. Here all
functions have a turn in every round, so that a slow minute meets them all. pytest-benchmark still
keeps the statistics (:mod:`bench.test_speed`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Functions: TypeAlias = Mapping[str, Callable[[], object]]
Quantiles: TypeAlias = dict[str, float]


def wall_clock_ms(function: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def cpu_ms(function: Callable[[], object]) -> float:
    """Milliseconds that this process computes in one call: a busy machine counts little.

    With one thread only: several would count their waiting for each other.
    """
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def quantiles(values: Sequence[float]) -> Quantiles:
    """The 20 %, 50 % and 80 % quantiles, and the number of ``calls``."""
    several = values if len(values) > 1 else [*values] * 2
    cuts = statistics.quantiles(several, n=10, method="inclusive")
    return {"p20": cuts[1], "median": cuts[4], "p80": cuts[7], "calls": len(values)}


def in_turns(
    functions: Functions,
    *,
    seconds: float = 1.0,
    rounds: int = 5,
    most: int = 20,
    once: Callable[[Callable[[], object]], float] = wall_clock_ms,
) -> dict[str, list[float]]:
    """Milliseconds of every call of every function.

    Args:
        functions: what to call, by name.
        seconds: per function for all rounds together; a fast one is called several times a round.
            A slow one that has used four times that leaves after its third round.
        rounds: in which each function has its turn, after one call to warm up.
        most: calls of a function in a round.
        once: milliseconds of one call.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        once(function)
    for number in range(rounds):
        for name, function in functions.items():
            mine = samples[name]
            if number >= 3 and sum(mine) > 4e3 * seconds:
                continue
            spent = 0.0
            for _ in range(most):
                mine.append(once(function))
                spent += mine[-1]
                if spent >= 1e3 * seconds / rounds:
                    break
    return samples


def timed(functions: Functions, **options: Any) -> dict[str, Quantiles]:
    """The quantiles of :func:`in_turns`, whose options it takes."""
    found = in_turns(functions, **options)
    return {name: quantiles(ms) for name, ms in found.items()}


def in_pairs(
    base: Callable[[], object], other: Callable[[], object], rounds: int
) -> dict[str, Quantiles]:
    """Two functions side by side, and what ``other`` takes longer within a pair.

    Small differences need pairs: what the machine does besides moves both calls alike.
    """
    pairs = []
    for number in range(rounds + 2):
        first, second = (base, other) if number % 2 else (other, base)
        pair = wall_clock_ms(first), wall_clock_ms(second)
        pairs.append(pair if number % 2 else pair[::-1])
    a, b = zip(*pairs[2:], strict=True)
    added = [y - x for x, y in pairs[2:]]
    return {"base": quantiles(a), "other": quantiles(b), "added": quantiles(added)}
