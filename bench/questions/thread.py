"""One core computes this much: CPU time of one thread, which a busy machine moves little."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import Result
from bench.cases import DECODE, HOSTS, Case, Turn
from bench.interleaved import cpu_ms, timed
from bench.providers import (
    AUTOGRAD,
    COMPILED,
    EAGER,
    LEAN,
    OURS,
    OURS_CHUNK,
    SLOW,
    THEIRS,
    Provider,
    Workload,
    checked,
)

RIVALS = (OURS, THEIRS, EAGER, COMPILED, LEAN, OURS_CHUNK, AUTOGRAD)
KINDS = ("forward", "forward_backward")


def ask(quick: bool, say: Callable[[str], None]) -> Result:
    """Times rivals on the base case and on a token, a write of a turn, and two lengths."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        say("the base case, one thread")
        rivals = [p for p in RIVALS if not (quick and p in SLOW)]
        base = _layers(Case("base", tokens=128) if quick else Case("base"), rivals, quick)
        say("a token and a turn, one thread")
        decode = _layers(DECODE, [OURS, THEIRS], quick)
        say("long streams, one thread")
        lengths = {}
        for tokens in (128, 256) if quick else (1024, 16384):
            lengths[str(tokens)] = _layers(Case("long", tokens=tokens), [OURS], quick)[OURS.name]
        return {"base": base, "decode": decode, "write": _write(quick), "lengths": lengths}
    finally:
        torch.set_num_threads(threads)


def _timed(functions: dict[str, Callable[[], Any]], quick: bool) -> dict[str, Any]:
    return timed(functions, once=cpu_ms, seconds=0.01 if quick else 2.0, most=200)


def _layers(case: Case, providers: list[Provider], quick: bool) -> dict[str, dict[str, Any]]:
    """By provider and kind; one that disagrees with the reference raises."""
    long = case.tokens > 4096  # where the reference would take minutes
    works = {p.name: Workload(p, case) if long else checked(p, case)[0] for p in providers}
    found = {
        kind: _timed({name: getattr(work, kind) for name, work in works.items()}, quick)
        for kind in KINDS
    }
    return {name: {kind: found[kind][name] for kind in KINDS} for name in works}


def _write(quick: bool) -> dict[str, Any]:
    """``memory_update`` of one turn of 112 tokens, native and portable."""
    update = Turn(HOSTS[-1], 1).calls()["memory_update"]
    with torch.no_grad():
        return _timed(
            {name: partial(update, backend=name) for name in ("auto", "reference")}, quick
        )
