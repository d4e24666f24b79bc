"""Turns that are interrupted by real signals at random moments, as by Ctrl-C or an alarm.

A timer of processor time raises KeyboardInterrupt anywhere in a loop of turns: in the library, in
PyTorch's Python, or in the host, as often on a busy machine as on an idle one. Each turn is played
again, under its ``turn_id``, until it has an answer.
"""

from __future__ import annotations

import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mal_kernels import MALAdapter
from mal_kernels.adapter.scope import _SCOPES
from mal_kernels.dialogues.snapshot import Snapshot
from mal_kernels.errors import NoDialogueWarning
from mal_kernels.store import DirectoryStore
from tests.reliability.echo import Echo, echo_adapter, turn_tokens

TURNS = 12  # of a dialogue, which is then forgotten and begins anew


def answer_to(host: Echo, mal: MALAdapter, turn: int) -> Tensor:
    """What the host answers in a turn; by a ``with`` block and by a call in turns."""
    dialogue = mal.dialogue("call", "AB"[turn % 2], turn_id=str(turn))
    tokens = turn_tokens(0, turn)
    if turn % 3:
        with torch.no_grad(), dialogue:
            return host(inputs_embeds=tokens)
    with torch.no_grad():
        return dialogue(inputs_embeds=tokens)


def answer_to_nobody(host: Echo) -> Tensor:
    """What the host answers outside of any dialogue, which an adapter with a memory warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoDialogueWarning)
        return host(inputs_embeds=turn_tokens(0, 0))


class Undisturbed:
    """Answers, and what is remembered after so many turns, of a run without interrupts."""

    def __init__(self) -> None:
        host, mal = echo_adapter()
        self.nobody = answer_to_nobody(host)
        self.answers, self.snapshots = list[Tensor](), [mal.dialogues.latest("call")]
        for turn in range(TURNS):
            begin = time.process_time()
            self.answers.append(answer_to(host, mal, turn))
            self.snapshots.append(mal.dialogues.latest("call"))
            self.seconds = time.process_time() - begin  # of the last turn

    def remembers(self, found: Snapshot) -> bool:
        """Whether ``found`` is what is remembered after as many turns as it has."""
        mine = self.snapshots[min(len(found.clips), TURNS)]
        return (found.clips, found.named, found.states.keys()) == (
            mine.clips,
            mine.named,
            mine.states.keys(),
        ) and all(
            torch.equal(a, b)
            for who in mine.states
            for a, b in zip(found.states[who].tensors(), mine.states[who].tensors(), strict=True)
        )


def left_behind(mal: MALAdapter) -> Counter[str]:
    """What an interrupt should not have left, by kind."""
    assert mal._attachment is not None
    hooks = mal._attachment.hooks
    found = {
        "scopes_left_open": bool(_SCOPES.get() or mal._scopes.dialogues),
        "stale_turns": bool(hooks._in_forward or hooks._in_generate),
    }
    return Counter({name: int(there) for name, there in found.items()})


def interrupts(count: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Interrupts turns in a folder, and after each looks at all that could be wrong.

    Args:
        count: interrupts that are to reach the turns.
        folder: of the dialogue.
        seed: of the moments.

    Returns:
        Counts of interrupts, of turns that were answered, and of what was wrong.
    """
    undisturbed, draw = Undisturbed(), random.Random(seed)
    host, mal = echo_adapter(DirectoryStore(folder))
    found, lost = Counter[str](), 0
    answers: list[Tensor] = []
    open_before, hits, turns = open_files(), 0, 0

    def ring(*_: object) -> None:
        raise KeyboardInterrupt

    def swallowed(error: Any) -> None:
        nonlocal lost
        lost += issubclass(error.exc_type, KeyboardInterrupt)  # and no warning of a file left open

    handler, hook = signal.signal(signal.SIGPROF, ring), sys.unraisablehook
    sys.unraisablehook = swallowed  # of an interrupt in a finalizer, which nobody sees
    try:
        while hits < count:
            wait = draw.uniform(1e-5, 1.5 * undisturbed.seconds)
            try:
                try:
                    signal.setitimer(signal.ITIMER_PROF, wait)
                    while len(answers) < TURNS:
                        answers.append(answer_to(host, mal, len(answers)))
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            except KeyboardInterrupt:
                hits += 1
            found += left_behind(mal)
            found["wrong_memories"] += not undisturbed.remembers(mal.dialogues.latest("call"))
            if hits % 10 == 0:  # a call of nobody
                here = answer_to_nobody(host)
                found["wrong_answers"] += not torch.equal(here, undisturbed.nobody)
            if len(answers) == TURNS:
                pairs = zip(answers, undisturbed.answers, strict=True)
                found["wrong_answers"] += sum(not torch.equal(a, b) for a, b in pairs)
                turns += TURNS
                answers.clear()
                mal.dialogues.forget(["call"])
    finally:
        signal.signal(signal.SIGPROF, handler)
        sys.unraisablehook = hook
    DirectoryStore(folder)  # removes what is nobody's
    kinds = ("scopes_left_open", "stale_turns", "wrong_memories", "wrong_answers")
    return {
        "interrupts": hits,
        "turns": turns + len(answers),
        **{kind: found[kind] for kind in kinds},
        "swallowed_in_finalizers": lost,
        "half_written_files": len(list(folder.glob(".*"))),
        "open_files_more_than_before": open_files() - open_before,
    }


def part(count: int, seed: int) -> dict[str, int]:
    """:func:`interrupts` in a folder that is removed."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        return interrupts(count, Path(folder) / "calls", seed)


def many_interrupts(
    count: int, *, size: int = 500, on_progress: Callable[[int], object] = lambda done: None
) -> dict[str, int]:
    """The sum of parts of ``size`` interrupts, in several processes."""
    found, every = Counter[str](), range(0, count, size)
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        for counts in pool.map(part, [size] * len(every), every):
            found.update(counts)
            on_progress(found["interrupts"])
    return dict(found)


def open_files() -> int:
    """Descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))
