"""Synthetic two-speaker dialogues whose emotion can only be read against the speaker's own voice.

All pitches are semitones relative to 160 Hz::

    baseline_s ~ N(0, 4^2)                    usual pitch of speaker s, new in every dialogue
    label_t    ~ uniform {low, neutral, high}
    pitch_t    = baseline_s + {-3, 0, +3}[label_t] + N(0, 0.6^2)
    wave_t     = render(pitch_t, vocal tract of s, vowels, loudness, noise)

The label reaches the audio only through ``pitch_t``, so by the data processing inequality nobody
who hears one utterance can beat :func:`single_cap`, and nobody who hears the dialogue up to now and
knows who speaks can beat :func:`context_cap`. Both are exact Bayes rules, not trained models.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

LABELS = ("low", "neutral", "high")
SAMPLE_RATE = 16_000
CLIP_SAMPLES = 10_240  # 0.64 s
BASELINE_SD, PITCH_SD, SHIFT = 4.0, 0.6, 3.0
REFERENCE_HZ = 160.0
TIMBRE_SD, TIMBRE_GAP = 0.13, 0.16  # log vocal-tract scale: spread, least distance of two speakers

OFFSETS = SHIFT * np.array([-1.0, 0.0, 1.0])
# formant centres and bandwidths in Hz of a, i, u, e, o (Peterson & Barney's averages, rounded)
VOWELS = np.array(
    [[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]]
)
BANDWIDTHS = np.array([90.0, 110.0, 170.0])
MAX_HARMONICS, MAX_HZ = 40, 4500.0


@dataclass(frozen=True)
class Script:
    """A script is what is said in N dialogues of T turns between S speakers.

    Attributes:
        speaker: int ``[N, T]``, index of the speaker of each turn.
        label: int ``[N, T]``, index into :data:`LABELS`.
        pitch: float ``[N, T]``, mean pitch of each turn in semitones.
        timbre: float ``[N, S]``, log vocal-tract scale of each speaker (independent of pitch).
    """

    speaker: np.ndarray
    label: np.ndarray
    pitch: np.ndarray
    timbre: np.ndarray

    @classmethod
    def cat(cls, scripts: Sequence[Script]) -> Script:
        """The dialogues of several scripts of equal T and S."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(s, name) for s in scripts]) for name in names))

    def __len__(self) -> int:
        return len(self.speaker)

    def history(self) -> np.ndarray:
        """Number of earlier turns by the same speaker, int ``[N, T]``."""
        same = self.speaker[:, :, None] == self.speaker[:, None, :]  # [N, T, T]
        return np.tril(same, k=-1).sum(-1)


def sample(rng: np.random.Generator, dialogues: int, turns: int = 16, speakers: int = 2) -> Script:
    """Draw the scripts of ``dialogues`` dialogues.

    Example:
        >>> script = sample(np.random.default_rng(0), dialogues=3, turns=4)
        >>> script.label.shape, int(script.history().max()) <= 3
        ((3, 4), True)
    """
    baseline = rng.normal(0, BASELINE_SD, (dialogues, speakers))
    timbre = np.stack([_distinct_timbres(rng, speakers) for _ in range(dialogues)])
    # after each turn another speaker takes over with probability 0.7
    jump = rng.integers(1, max(speakers, 2), (dialogues, turns))
    jump *= rng.random((dialogues, turns)) >= 0.3
    speaker = (rng.integers(speakers, size=(dialogues, 1)) + jump.cumsum(1)) % speakers
    label = rng.integers(len(LABELS), size=(dialogues, turns))
    usual = np.take_along_axis(baseline, speaker, axis=1)
    pitch = usual + OFFSETS[label] + rng.normal(0, PITCH_SD, (dialogues, turns))
    return Script(speaker, label, pitch, timbre)


def _distinct_timbres(rng: np.random.Generator, speakers: int) -> np.ndarray:
    while True:
        timbre = rng.normal(0, TIMBRE_SD, speakers)
        if speakers == 1 or np.diff(np.sort(timbre)).min() > TIMBRE_GAP:
            return timbre


def render_script(rng: np.random.Generator, script: Script) -> np.ndarray:
    """The sound of every turn, float32 ``[N, T, CLIP_SAMPLES]`` in [-1, 1]."""
    timbre = np.take_along_axis(script.timbre, script.speaker, axis=1)
    waves = [render(rng, p, t) for p, t in zip(script.pitch.flat, timbre.flat, strict=True)]
    return np.stack(waves).reshape(*script.pitch.shape, CLIP_SAMPLES)


def render(rng: np.random.Generator, pitch: float, timbre: float) -> np.ndarray:
    """One utterance as float32 ``[CLIP_SAMPLES]`` in [-1, 1].

    A harmonic series of that pitch passes the formants, scaled by ``exp(timbre)``, of 2-3 vowels.
    Everything else (contour, vowels, loudness, 15-25 dB noise) is drawn from ``rng``.
    """
    f0 = REFERENCE_HZ * 2.0 ** ((pitch + _contour(rng)) / 12)
    harmonics = np.arange(1, min(MAX_HARMONICS, int(MAX_HZ / f0.max())) + 1)
    waves = _sines(2 * np.pi / SAMPLE_RATE * np.cumsum(f0), len(harmonics))  # [K, CLIP_SAMPLES]
    wave = np.empty(CLIP_SAMPLES)
    edges = np.linspace(0, CLIP_SAMPLES, rng.integers(2, 4) + 1).astype(int)
    for start, stop in itertools.pairwise(edges):  # one vowel per syllable
        formants = VOWELS[rng.integers(len(VOWELS))] * np.exp(timbre)
        spectrum = _spectrum(harmonics, f0[start:stop].mean(), formants)
        envelope = np.hanning(stop - start) ** 0.5 * rng.uniform(0.6, 1.0)
        wave[start:stop] = spectrum @ waves[:, start:stop] * envelope
    wave /= np.sqrt(np.mean(wave**2)) + 1e-8
    wave += rng.standard_normal(CLIP_SAMPLES, np.float32) * 10 ** (-rng.uniform(15, 25) / 20)
    loudness = 0.05 * 10 ** (rng.uniform(-6, 6) / 20)
    return np.clip(loudness * wave, -1, 1).astype(np.float32)


def _contour(rng: np.random.Generator) -> np.ndarray:
    """Intonation in semitones; its mean is zero, so the mean log pitch is exactly the script's."""
    t = np.arange(CLIP_SAMPLES) / SAMPLE_RATE
    slope = rng.uniform(-1.2, 1.2) * t / t[-1]
    vibrato = 0.35 * np.sin(2 * np.pi * rng.uniform(2, 5) * t + rng.uniform(0, 2 * np.pi))
    return slope + vibrato - np.mean(slope + vibrato)


def _sines(phase: np.ndarray, count: int) -> np.ndarray:
    """``sin(k * phase)`` for k = 1..count, by ``s_k = 2 cos(phase) s_{k-1} - s_{k-2}``."""
    waves = np.empty((count + 1, len(phase)))
    waves[0], waves[1] = 0.0, np.sin(phase)
    twice_cos = 2 * np.cos(phase)
    for k in range(2, count + 1):
        np.multiply(twice_cos, waves[k - 1], out=waves[k])
        waves[k] -= waves[k - 2]
    return waves[1:]


def _spectrum(harmonics: np.ndarray, f0: float, formants: np.ndarray) -> np.ndarray:
    """Amplitude of each harmonic: a falling source times the resonances of the vowel, ``[K]``."""
    distance = (harmonics[:, None] * f0 - formants) / BANDWIDTHS  # [K, 3]
    return np.sum(1 / (1 + distance**2), axis=1) / harmonics**0.6 + 0.02 / harmonics


def _normal(z: np.ndarray, sd: float) -> np.ndarray:
    return np.exp(-0.5 * (z / sd) ** 2) / (sd * np.sqrt(2 * np.pi))


def single_cap(script: Script) -> np.ndarray:
    """The best guess from the turn's own sound alone, int ``[N, T]``."""
    sd = np.hypot(BASELINE_SD, PITCH_SD)
    return np.argmax(_normal(script.pitch[..., None] - OFFSETS, sd), axis=-1)


def single_cap_accuracy(points: int = 200_001) -> float:
    """Expected accuracy of :func:`single_cap`: the integral of the largest joint density."""
    sd = np.hypot(BASELINE_SD, PITCH_SD)
    pitch = np.linspace(-10 * sd, 10 * sd, points)
    best = _normal(pitch[:, None] - OFFSETS, sd).max(axis=1) / len(LABELS)
    return float(best.sum() * (pitch[1] - pitch[0]))


def context_cap(script: Script, points: int = 701) -> np.ndarray:
    """The best guess from all sound so far and who spoke when, int ``[N, T]``.

    A filter over each speaker's baseline, on a grid of ±5 deviations; past labels are not given.
    """
    grid = np.linspace(-5 * BASELINE_SD, 5 * BASELINE_SD, points)
    dialogues, turns = script.pitch.shape
    rows = np.arange(dialogues)
    # belief [N, S, G]: p(baseline of this speaker | its turns so far), unnormalised
    belief = np.tile(_normal(grid, BASELINE_SD), (*script.timbre.shape, 1))
    guess = np.empty((dialogues, turns), int)
    for t in range(turns):
        speaker = script.speaker[:, t]
        prior = belief[rows, speaker]  # [N, G]
        error = script.pitch[:, t, None, None] - grid[:, None] - OFFSETS  # [N, G, 3]
        joint = prior[:, :, None] * _normal(error, PITCH_SD)
        guess[:, t] = joint.sum(1).argmax(-1)
        posterior = joint.sum(-1)
        belief[rows, speaker] = posterior / posterior.sum(-1, keepdims=True)
    return guess
