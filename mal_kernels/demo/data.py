"""Dialogues for training: scripts, and what Whisper's front end makes of their sound."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mal_kernels.demo import small_host, synth

CHUNK = 20  # dialogues rendered by a worker at a time


@dataclass(frozen=True)
class Dialogues:
    """Scripts with the log-mel features of every turn, float16 ``[N, T, MELS, FRAMES]``."""

    script: synth.Script
    features: Tensor


def make_dialogues(
    seed: int, count: int, *, workers: int = 2, on_step: Callable[[], object] = lambda: None
) -> Dialogues:
    """Render ``count`` dialogues; the result does not depend on ``workers``.

    ``on_step`` is called after every ``CHUNK`` dialogues.
    """
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    seeds = np.random.SeedSequence(seed).spawn(len(sizes))
    scripts, features = [], []
    with _mapper(workers) as mapper:
        for script, mels in mapper(_make_chunk, seeds, sizes):
            scripts.append(script)
            features.append(torch.from_numpy(mels))
            on_step()
    return Dialogues(synth.Script.cat(scripts), torch.cat(features))


@contextmanager
def _mapper(workers: int) -> Iterator[Callable]:
    if workers <= 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would share torch's thread pool
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield pool.map


def _make_chunk(seed: np.random.SeedSequence, count: int) -> tuple[synth.Script, np.ndarray]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    script = synth.sample(rng, count)
    waves = synth.render_script(rng, script)
    mels = small_host.build_feature_extractor()(
        list(waves.reshape(-1, synth.CLIP_SAMPLES)),
        sampling_rate=synth.SAMPLE_RATE,
        return_tensors="np",
    )["input_features"].astype(np.float16)
    return script, mels.reshape(*script.label.shape, *mels.shape[1:])
