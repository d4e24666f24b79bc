"""Every corpus becomes dialogues of turns, in the order in which they were spoken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ...errors import ArgumentError, AudioFileError

SAMPLE_RATE = 16_000
MIN_SECONDS, MAX_SECONDS = 0.1, 30.0  # shorter clips hold no speech; Whisper hears 30 s
SPLITS = ("train", "validation", "test")


class CorpusError(ArgumentError):
    """A corpus directory is not what its loader expects; the message says what is missing."""


@dataclass(frozen=True)
class Turn:
    """One utterance.

    Attributes:
        id: unique in the corpus.
        speaker: who speaks, unique within the dialogue at least; ``None`` if unknown.
        audio: a file, a function that returns float32 ``[samples]`` at 16 kHz, or ``None`` where
            the corpus has no sound. A turn without sound is neither written to memory nor scored.
        label: one of the labels of the corpus, or ``None``: heard, but not scored.
        start: seconds from the start of the recording.
        end: the same.
        note: why this turn is treated specially, if it is.
    """

    id: str
    speaker: str | None
    audio: Path | Callable[[], np.ndarray] | None
    label: str | None
    start: float = 0.0
    end: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Dialogue:
    """Turns in order.

    Attributes:
        id: unique in the corpus.
        turns: the turns.
        split: ``train``, ``validation`` or ``test``; for IEMOCAP the session.
        kind: a slice to report apart, such as ``improvised``.
    """

    id: str
    turns: tuple[Turn, ...]
    split: str
    kind: str = ""


@dataclass(frozen=True)
class Corpus:
    """Dialogues with the labels that they are scored on.

    Attributes:
        name: of the corpus and of its protocol.
        labels: in the order of the class indices.
        dialogues: all of them.
        expected: counts of the complete corpus, for :meth:`check`.
        notes: what the loader decided or found odd.
    """

    name: str
    labels: tuple[str, ...]
    dialogues: tuple[Dialogue, ...]
    expected: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> Corpus:
        """The dialogues of one split.

        Raises:
            CorpusError: there is none.
        """
        chosen = tuple(d for d in self.dialogues if d.split == name)
        if not chosen:
            known = sorted({d.split for d in self.dialogues})
            raise CorpusError(f"split is {name!r}, but {self.name} has {known}; pass one of them.")
        return replace(self, dialogues=chosen)

    def counts(self) -> dict[str, int]:
        """Dialogues, turns and scored turns, also by split; and turns by label."""
        every = [(d, t) for d in self.dialogues for t in d.turns]
        scored = [(d, t) for d, t in every if t.label is not None and t.audio is not None]
        counts = {
            "dialogues": len(self.dialogues),
            "turns": len(every),
            "turns without audio": sum(t.audio is None for _, t in every),
            "scored": len(scored),
        }
        for word, items in (
            ("dialogues", [d.split for d in self.dialogues]),
            ("turns", [d.split for d, _ in every]),
            ("scored", [d.split for d, _ in scored]),
        ):
            counts |= {f"{word}, {name}": n for name, n in sorted(Counter(items).items())}
        labels = Counter(t.label for _, t in every)
        return counts | {f"labelled {name}": labels[name] for name in self.labels}

    def check(self) -> dict[str, tuple[int, int]]:
        """Counts that differ from those of the complete corpus, as ``(found, expected)``."""
        found = self.counts()
        return {
            name: (found.get(name, 0), number)
            for name, number in self.expected.items()
            if found.get(name, 0) != number
        }


def read_audio(turn: Turn) -> np.ndarray | None:
    """The sound of a turn, float32 ``[samples]`` at 16 kHz, its first 30 s at most.

    ``None`` if there is none, or less than 0.1 s of it: such a turn keeps its place only.

    Raises:
        AudioFileError: the file is missing, not audio, or not finite.
    """
    if turn.audio is None:
        return None
    wave = turn.audio() if callable(turn.audio) else _read_file(turn.audio)
    if len(wave) < MIN_SECONDS * SAMPLE_RATE:
        return None
    return wave[: int(MAX_SECONDS * SAMPLE_RATE)]


def _read_file(path: Path) -> np.ndarray:
    import soundfile

    if not path.is_file():
        raise AudioFileError(
            f"{path}: no such file; run `python -m mal_kernels.ser check` to see what is missing."
        )
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise AudioFileError(
            f"{path}: not readable as audio ({error}); copy it again from the corpus."
        ) from error
    mono = wave.mean(axis=1)
    if rate != SAMPLE_RATE and len(mono):
        import soxr

        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    if not np.isfinite(mono).all():
        raise AudioFileError(f"{path}: samples are not finite; copy it again from the corpus.")
    return mono.astype(np.float32)
