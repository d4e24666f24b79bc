"""Four synthetic corpora that differ only in what the history of a dialogue is worth.

Per speaker, over the speaker's own turns ``k`` (pitches in semitones, as in
:mod:`mal_kernels.demo.synth`)::

    baseline_0 ~ N(0, 4^2)          baseline_k = ρ baseline_{k-1} + sqrt(1 - ρ²) N(0, 4^2)
    label_0 ~ uniform               label_k = label_{k-1} with probability p, else another one
    pitch_k = baseline_k + {-3, 0, +3}[label_k] + N(0, 0.6^2)

Both chains are stationary, so one utterance is distributed the same in all four: they share the
host, and the best accuracy from one utterance is the same .526. What the history adds is not:

========  ====  ===  ===========================================================================
baseline  1     1/3  the speaker's usual pitch is fixed: history helps, its order does not matter
inertia   1     .7   labels persist: copying the last one helps too
drift     .9    1/3  the usual pitch drifts: recent turns count more, so order matters
trap      0     1/3  a new pitch every turn: history is worth nothing
========  ====  ===  ===========================================================================

:func:`context_cap` is the exact Bayes rule of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...demo import synth
from . import SAMPLE_RATE, SPLITS, Corpus, CorpusError, Dialogue, Turn

TURNS, SPEAKERS = 16, 2
SECONDS = synth.CLIP_SAMPLES / SAMPLE_RATE


@dataclass(frozen=True)
class Process:
    """ρ and p of the module's docstring."""

    persistence: float = 1.0
    stickiness: float = 1 / 3

    @property
    def label_transition(self) -> np.ndarray:
        """``[3, 3]``, from the last label to the next."""
        n = len(synth.LABELS)
        other = (1 - self.stickiness) / (n - 1)
        return np.full((n, n), other) + (self.stickiness - other) * np.eye(n)


VARIANTS = {
    "baseline": Process(),
    "inertia": Process(stickiness=0.7),
    "drift": Process(persistence=0.9),
    "trap": Process(persistence=0.0),
}


@dataclass(frozen=True)
class Utterance:
    """The sound of a turn, rendered when it is asked for; the same every time."""

    pitch: float
    timbre: float
    seed: tuple[int, ...]

    def __call__(self) -> np.ndarray:
        """Float32 ``[synth.CLIP_SAMPLES]``."""
        return synth.render(np.random.default_rng(self.seed), self.pitch, self.timbre)


def script(variant: str, split: str, dialogues: int, seed: int = 0) -> synth.Script:
    """Draws what is said in the dialogues of one split.

    Raises:
        CorpusError: unknown variant or split.

    Example:
        >>> script("trap", "test", 3).label.shape
        (3, 16)
    """
    if variant not in VARIANTS or split not in SPLITS:
        raise CorpusError(
            f"synthetic corpus {variant!r}, split {split!r}; the variants are {list(VARIANTS)}, "
            f"the splits {list(SPLITS)}."
        )
    process, rng = VARIANTS[variant], np.random.default_rng(_seed(variant, split, seed))
    drawn = synth.sample(rng, dialogues, TURNS, SPEAKERS)
    shape = (dialogues, SPEAKERS, TURNS)  # a speaker has at most TURNS turns
    baseline = rng.normal(0, synth.BASELINE_SD, shape)
    label = rng.integers(len(synth.LABELS), size=shape)
    shift = rng.integers(1, len(synth.LABELS), shape) * (rng.random(shape) >= process.stickiness)
    rho = process.persistence
    for k in range(1, TURNS):
        baseline[..., k] = rho * baseline[..., k - 1] + np.sqrt(1 - rho**2) * baseline[..., k]
        label[..., k] = (label[..., k - 1] + shift[..., k]) % len(synth.LABELS)
    at = (np.arange(dialogues)[:, None], drawn.speaker, drawn.history())
    noise = rng.normal(0, synth.PITCH_SD, drawn.label.shape)
    pitch = baseline[at] + synth.OFFSETS[label[at]] + noise
    return replace(drawn, label=label[at], pitch=pitch)


def _seed(variant: str, split: str, seed: int) -> tuple[int, ...]:
    return (2607, seed, list(VARIANTS).index(variant), SPLITS.index(split))


def build(variant: str, sizes: dict[str, int], seed: int = 0) -> Corpus:
    """A corpus of ``sizes`` dialogues per split; audio is rendered on reading.

    Example:
        >>> corpus = build("drift", {"train": 2, "test": 1})
        >>> corpus.counts()["turns"], corpus.dialogues[0].turns[0].audio().shape
        (48, (10240,))
    """
    dialogues = [
        _dialogue(
            f"{variant}-{split}-{n}-of-{size}", split, said, n, (*_seed(variant, split, seed), n)
        )
        for split, size in sizes.items()
        for said in [script(variant, split, size, seed)]
        for n in range(size)
    ]
    return Corpus(f"synthetic {variant}", synth.LABELS, tuple(dialogues))


def _dialogue(name: str, split: str, said: synth.Script, n: int, seed: tuple[int, ...]) -> Dialogue:
    turns = []
    for t, who in enumerate(said.speaker[n].tolist()):
        audio = Utterance(float(said.pitch[n, t]), float(said.timbre[n, who]), (*seed, t))
        label = synth.LABELS[said.label[n, t]]
        times = (SECONDS * t, SECONDS * (t + 1))
        turns.append(Turn(f"{name}-{t}", "AB"[who], audio, label, *times))
    return Dialogue(name, tuple(turns), split)


def context_cap(said: synth.Script, process: Process, points: int = 401) -> np.ndarray:
    """The best guess from all sound so far and who spoke when, int ``[N, T]``.

    A filter over each speaker's baseline (a grid of ±4.5 deviations) and last label; past labels
    are not given. With ``trap`` it equals :func:`mal_kernels.demo.synth.single_cap`.
    """
    grid = np.linspace(-4.5 * synth.BASELINE_SD, 4.5 * synth.BASELINE_SD, points)
    drift = _drift(grid, process.persistence)
    start = _normal(grid, synth.BASELINE_SD) / len(synth.LABELS)
    dialogues, turns = said.pitch.shape
    rows = np.arange(dialogues)
    # belief [N, S, G, 3]: of this speaker's last baseline and label, given its turns so far
    belief = np.tile(start[:, None], (*said.timbre.shape, 1, len(synth.LABELS)))
    guess = np.empty((dialogues, turns), int)
    for t in range(turns):
        speaker = said.speaker[:, t]
        prior = belief[rows, speaker] @ process.label_transition  # [N, G, 3]
        if drift is not None:
            prior = np.einsum("ngc,gh->nhc", prior, drift, optimize=True)
        error = said.pitch[:, t, None, None] - grid[:, None] - synth.OFFSETS
        joint = prior * _normal(error, synth.PITCH_SD)
        guess[:, t] = joint.sum(1).argmax(-1)
        belief[rows, speaker] = joint / joint.sum((1, 2), keepdims=True)
    return guess


def _drift(grid: np.ndarray, rho: float) -> np.ndarray | None:
    """Transition of the baseline on the grid, ``[G, G]``; ``None`` if it does not move."""
    if rho == 1:
        return None
    sd = synth.BASELINE_SD * np.sqrt(1 - rho**2)
    kernel = _normal(grid - rho * grid[:, None], sd)
    return kernel / kernel.sum(1, keepdims=True)


def _normal(z: np.ndarray, sd: float) -> np.ndarray:
    return np.exp(-0.5 * (z / sd) ** 2)
