"""Plays dialogues through ``host.generate``, turn by turn, with and without memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mal_kernels import NoDialogueWarning
from mal_kernels.demo import small_host, synth

if TYPE_CHECKING:
    from transformers import BatchFeature, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

    from mal_kernels import MALAdapter

BATCH = 50  # dialogues played at a time
UNSEEN = 2606  # training draws from np.random.SeedSequence(small int)
# ranges of earlier turns by the same speaker, for which accuracy is given apart
HISTORY = ((0, 0), (1, 1), (2, 3), (4, 6), (7, 99))


@dataclass(frozen=True)
class Turn:
    """A step is what happened at one turn of a batch of N dialogues.

    Attributes:
        without: class of each answer of the frozen host, int ``[N]``; -1: the token is no answer.
        with_memory: the same with the memory of the speaker's earlier turns.
        surprise: how much the memory mispredicted the turn before writing it, float ``[N]``.
        host_ms: time of ``generate`` without the adapter, for the whole batch.
        memory_ms: what the adapter adds to it: reading, and writing the turn.
    """

    without: np.ndarray
    with_memory: np.ndarray
    surprise: np.ndarray
    host_ms: float
    memory_ms: float


class Player:
    """A host with an adapter attached, asked for the emotion of one turn after the other."""

    def __init__(
        self,
        host: Qwen2AudioForConditionalGeneration,
        mal: MALAdapter,
        processor: Qwen2AudioProcessor,
    ) -> None:
        self.host, self.mal, self.processor = host, mal, processor

    def turns(
        self, waves: np.ndarray, speakers: Sequence[Sequence[str]], timings: int = 1
    ) -> Iterator[Turn]:
        """Play ``N`` dialogues of ``T`` turns as the rows of a batch; nothing of them is kept.

        Args:
            waves: float32 ``[N, T, CLIP_SAMPLES]``.
            speakers: who speaks, ``N`` lists of ``T`` names.
            timings: times to answer each turn, of which the fastest counts; all but the last are
                undone.
        """
        ids = [f"dialogue-{row}" for row in range(len(waves))]
        try:
            for t in range(waves.shape[1]):
                inputs = small_host.prompt(self.processor, waves[:, t])
                without, host_ms = self._without_memory(inputs, timings)
                dialogue = self.mal.dialogue(ids, speaker=[row[t] for row in speakers])
                answer, both_ms = self._answer(dialogue.generate, inputs, timings, dialogue.undo)
                surprise = self.mal.last_turn.surprise.numpy()
                yield Turn(without, answer, surprise, host_ms, both_ms - host_ms)
        finally:
            self.mal.dialogues.forget(ids)

    def answer_alone(self, waves: np.ndarray) -> np.ndarray:
        """The control: each of ``[N, CLIP_SAMPLES]`` is a dialogue of its own for the adapter."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoDialogueWarning)  # which is what is asked here
            return self._answer(self.host.generate, small_host.prompt(self.processor, waves))[0]

    def _without_memory(self, inputs: BatchFeature, timings: int) -> tuple[np.ndarray, float]:
        with self.mal.disable_adapter():
            return self._answer(self.host.generate, inputs, timings)

    def _answer(
        self,
        generate: Callable[..., torch.Tensor],
        inputs: BatchFeature,
        timings: int = 1,
        again: Callable[[], object] = lambda: None,
    ) -> tuple[np.ndarray, float]:
        """Answers ``[N]`` and the least time in ms; ``again`` precedes every further attempt."""
        elapsed = []
        for attempt in range(timings):
            if attempt:
                again()
            start = time.perf_counter()
            tokens = generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
            elapsed.append(1e3 * (time.perf_counter() - start))
        hits = tokens[:, None] == torch.tensor(small_host.answer_ids())  # [N, 3]
        return torch.where(hits.any(1), hits.int().argmax(1), -1).numpy(), min(elapsed)


@dataclass(frozen=True)
class Score:
    """Accuracy of one way of answering.

    Attributes:
        accuracy: over all turns.
        error: its standard error, from the spread over dialogues.
        by_history: accuracy in each of the :data:`HISTORY` ranges.
        curve: accuracy after 0, 1, 2, ... earlier turns by the same speaker.
    """

    accuracy: float
    error: float
    by_history: tuple[float, ...]
    curve: tuple[float, ...]


def score(script: synth.Script, answers: np.ndarray, longest: int = 8) -> Score:
    """Compare ``answers`` int ``[N, T]`` with the labels."""
    right = answers == script.label
    history = script.history()
    per_dialogue = right.mean(axis=1)
    return Score(
        accuracy=float(right.mean()),
        error=float(per_dialogue.std() / np.sqrt(len(script))),
        by_history=tuple(_mean(right, (history >= a) & (history <= b)) for a, b in HISTORY),
        curve=tuple(_mean(right, history == n) for n in range(longest + 1)),
    )


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean()) if where.any() else float("nan")


@dataclass(frozen=True)
class Evaluation:
    """Figures of many dialogues.

    Attributes:
        scores: by way of answering: ``no memory`` is the frozen host, ``memory`` the host with MAL,
            ``memory, reset`` the same with every turn a dialogue of its own, and the two caps.
        surprise: of every turn, float ``[N, T]``.
    """

    scores: dict[str, Score]
    surprise: np.ndarray

    @property
    def gain(self) -> float:
        """Accuracy with memory above the best that a single utterance allows."""
        return self.scores["memory"].accuracy - self.scores["single-utterance cap"].accuracy


def evaluate(
    player: Player,
    dialogues: int,
    seed: int = 0,
    *,
    turns: int = 16,
    on_turn: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Play new dialogues, ``BATCH`` at a time as the rows of one ``generate`` call per turn.

    ``on_turn`` is called after every turn of a batch.
    """
    rng = unseen(seed)
    scripts, surprise = [], []
    answers: dict[str, list[np.ndarray]] = {"no memory": [], "memory": [], "memory, reset": []}
    for start in range(0, dialogues, BATCH):
        script = synth.sample(rng, min(BATCH, dialogues - start), turns)
        waves = synth.render_script(rng, script)
        columns = []
        for t, turn in enumerate(player.turns(waves, names(script))):
            columns.append((turn.without, turn.with_memory, player.answer_alone(waves[:, t])))
            surprise.append(turn.surprise)
            on_turn()
        for way, column in zip(answers.values(), zip(*columns, strict=True), strict=True):
            way.append(np.stack(column, axis=1))
        scripts.append(script)
    script = synth.Script.cat(scripts)
    ways = {way: np.concatenate(parts) for way, parts in answers.items()}
    ways["single-utterance cap"] = synth.single_cap(script)
    ways["context cap"] = synth.context_cap(script)
    scores = {way: score(script, guesses) for way, guesses in ways.items()}
    return Evaluation(scores, _per_dialogue(surprise, turns))


def _per_dialogue(columns: list[np.ndarray], turns: int) -> np.ndarray:
    """Columns of one turn each, batch after batch, as ``[N, T]``."""
    batches = [columns[i : i + turns] for i in range(0, len(columns), turns)]
    return np.concatenate([np.stack(batch, axis=1) for batch in batches])


def unseen(seed: int) -> np.random.Generator:
    """Randomness for dialogues that no training run has heard."""
    return np.random.default_rng([UNSEEN, seed])


def names(script: synth.Script) -> list[list[str]]:
    """The speakers of every turn as letters."""
    return [[chr(ord("A") + speaker) for speaker in row] for row in script.speaker]


def verdict(result: Evaluation) -> str:
    """Says what the figures show, in words that can also say no."""
    memory, cap = result.scores["memory"], result.scores["single-utterance cap"]
    alone, most = result.scores["no memory"], result.scores["context cap"]
    used = result.gain > 3 * memory.error
    return (
        f"No memory {alone.accuracy:.3f} · memory {memory.accuracy:.3f} · best possible from one "
        f"utterance {cap.accuracy:.3f}, from the dialogue so far {most.accuracy:.3f}.\n"
        f"Memory is {result.gain:+.3f} from what any single-utterance model could reach: "
        + ("it answers from what it heard before." if used else "no sign that it is used.")
    )
