"""Dialogues as a stream of windows: who continues where, on every rank and after a restart."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from .host import EncodedDialogue
from .model import DialogueModel, collate


class Part(NamedTuple):
    """Turns ``start:stop`` of a dialogue; ``dialogue`` -1: nothing left for this row."""

    dialogue: int
    start: int
    stop: int


def plan(lengths: Sequence[int], rows: int, window: int, seed: int) -> list[list[Part]]:
    """One epoch: for each step, the part that each of ``rows`` rows gets.

    Dialogues are shuffled and dealt to the row with the least to do; a row goes through its
    dialogues window by window, so its next part continues the one before. Every row has as many
    parts, the last ones empty where a row is done.

    Example:
        >>> plan([3, 2, 1], rows=2, window=2, seed=0)[0]
        [Part(dialogue=2, start=0, stop=1), Part(dialogue=0, start=0, stop=2)]
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    queues: list[list[Part]] = [[] for _ in range(rows)]
    for d in order:
        starts = range(0, lengths[d], window)
        queue = min(queues, key=len)
        queue.extend(Part(d, start, min(start + window, lengths[d])) for start in starts)
    steps = max(map(len, queues))
    padded = [queue + [Part(-1, 0, 0)] * (steps - len(queue)) for queue in queues]
    return [list(step) for step in zip(*padded, strict=True)]


class RankSampler:
    """The parts of this rank's rows, step by step: rank ``r`` always has the same rows.

    Args:
        lengths: turns of every dialogue.
        rows: dialogues in a step of this rank.
        window: turns in a part.
        rank: of this process.
        world: number of processes.
        seed: of the order; every epoch has another one.
    """

    def __init__(
        self, lengths: Sequence[int], rows: int, window: int, rank: int, world: int, seed: int
    ) -> None:
        self.lengths, self.rows, self.window = lengths, rows, window
        self.rank, self.world, self.seed, self.epoch = rank, world, seed, 0
        self.batch_size, self.drop_last = rows, False

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next."""
        self.epoch = epoch

    def _plan(self) -> list[list[Part]]:
        seed = self.seed + 1_000_003 * self.epoch
        return plan(self.lengths, self.rows * self.world, self.window, seed)

    def __len__(self) -> int:
        return len(self._plan())

    def __iter__(self) -> Iterator[list[Part]]:
        mine = slice(self.rank * self.rows, (self.rank + 1) * self.rows)
        return (step[mine] for step in self._plan())


class _Parts(Dataset[Any]):
    """Looks parts up."""

    def __init__(self, dialogues: Sequence[EncodedDialogue]) -> None:
        self.dialogues = dialogues

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, part: Part) -> tuple[EncodedDialogue | None, int, int]:
        dialogue = self.dialogues[part.dialogue] if part.dialogue >= 0 else None
        return dialogue, part.start, part.stop


class WindowLoader(DataLoader[Any]):
    """Windows of ``dialogues`` for one rank, each a dict for :class:`DialogueModel`."""

    def __init__(self, dialogues: Sequence[EncodedDialogue], sampler: RankSampler) -> None:
        self.sampler_of_parts = sampler
        super().__init__(
            _Parts(dialogues),
            batch_sampler=sampler,
            collate_fn=partial(_collate, sampler.window, dialogues[0]),
        )

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says which epoch comes next."""
        self.sampler_of_parts.set_epoch(epoch)


def _collate(
    turns: int,
    any_dialogue: EncodedDialogue,
    parts: list[tuple[EncodedDialogue | None, int, int]],
) -> dict[str, torch.Tensor]:
    """A window; where all rows of a rank are done, one of silence keeps the ranks in step."""
    if all(dialogue is None for dialogue, _, _ in parts):
        window = collate([(any_dialogue, 0, 1), *parts[1:]], turns)
        window.labels.fill_(-100)
        window.audio.fill_(False)
        return window.as_dict()
    return collate(parts, turns).as_dict()


def play(
    model: DialogueModel, dialogues: Sequence[EncodedDialogue], *, enabled: bool = True
) -> Generator[torch.Tensor]:
    """Dialogues turn by turn through the hooks of :class:`mal_kernels.MALAdapter`.

    The definition that :class:`DialogueModel` computes at once; also for sites inside the decoder.

    Args:
        model: with a memory of ``MALAdapter``.
        dialogues: one after the other.
        enabled: ``False``: the host alone.

    Yields:
        Log-likelihoods of the labels ``[L]``, for every turn that has sound.
    """
    mal = model.adapter().mal
    mal.attach(model.host, freeze=False)
    try:
        for dialogue in dialogues:
            for turn, speaker in zip(dialogue.turns, dialogue.speaker, strict=True):
                if not bool(turn.audio.any()):
                    continue
                who = f"speaker {speaker}" if model.arm.by_speaker else None
                embeds = turn.embeds[None].to(model.answers.device)
                there = torch.ones(1, 1, embeds.shape[1], dtype=torch.bool, device=embeds.device)
                scored = there[..., 0]
                contexts: list[AbstractContextManager[object]] = [mal.disable_adapter()]
                if enabled:
                    mask = turn.audio[None].to(embeds.device)
                    contexts = [
                        mal.dialogue(dialogue.dialogue.id, speaker=who),
                        mal.audio_mask(mask),
                    ]
                answer = partial(model.answer, embeds[None], there, scored, None)
                yield _within(contexts, answer)[0].cpu()
            mal.dialogues.forget([dialogue.dialogue.id])
    finally:
        mal.dialogues.forget()
        mal.detach()


def _within(
    contexts: Sequence[AbstractContextManager[object]], call: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """A call inside of contexts, which a generator may not keep open while it waits."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return call()
