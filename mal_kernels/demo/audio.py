"""The user's own recordings as turns of a dialogue."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mal_kernels.demo.synth import CLIP_SAMPLES, SAMPLE_RATE
from mal_kernels.errors import AudioFileError, needs

LOUDNESS = 0.05  # root mean square of a synthetic utterance, on average


def load_turn(path: str | Path) -> np.ndarray:
    """The loudest 0.64 s of a recording, float32 ``[CLIP_SAMPLES]`` at 16 kHz.

    Any sample rate and channel count that libsndfile reads; channels are averaged, and the level is
    made that of the synthetic turns. Shorter recordings are padded with silence.

    Raises:
        AudioFileError: the file is missing, is not audio, or holds no sound.
        MissingPackage: soundfile or soxr is not installed.
    """
    wave, rate = _read(Path(path))
    mono = wave.mean(axis=1)
    if rate != SAMPLE_RATE:
        import soxr

        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    clip = _loudest(mono)
    level = np.sqrt(np.mean(clip**2))
    if not level > 1e-6:
        raise AudioFileError(
            f"{path}: the recording is silent (root mean square {level:.1e}); expected speech. "
            "Record it again or leave it out."
        )
    return np.clip(clip * (LOUDNESS / level), -1, 1).astype(np.float32)


def _read(path: Path) -> tuple[np.ndarray, int]:
    """Samples ``[N, channels]`` and the sample rate."""
    with needs("audio", f"{path}: reading recordings"):
        import soundfile
        import soxr  # noqa: F401  fail before any work, not at the first 44.1 kHz file
    if not path.is_file():
        raise AudioFileError(f"{path}: no such file; pass the path of a WAV or FLAC file.")
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise AudioFileError(
            f"{path}: not readable as audio ({error}); expected WAV, FLAC, OGG or MP3. Convert it: "
            f"ffmpeg -i {path.name} -ac 1 -ar 16000 {path.stem}-16k.wav"
        ) from error
    if not len(wave):
        raise AudioFileError(
            f"{path}: holds no samples; expected at least a fraction of a second of speech. "
            "Record it again or leave it out."
        )
    if not np.isfinite(wave).all():
        raise AudioFileError(
            f"{path}: holds samples that are not finite numbers; export it again as 16-bit PCM."
        )
    return wave, int(rate)


def _loudest(mono: np.ndarray) -> np.ndarray:
    """The ``CLIP_SAMPLES`` with the most energy, padded at the end if there are not so many."""
    if len(mono) <= CLIP_SAMPLES:
        return np.pad(mono, (0, CLIP_SAMPLES - len(mono)))
    energy = np.concatenate([[0.0], np.cumsum(mono.astype(np.float64) ** 2)])
    start = int(np.argmax(energy[CLIP_SAMPLES:] - energy[:-CLIP_SAMPLES]))
    return mono[start : start + CLIP_SAMPLES]
