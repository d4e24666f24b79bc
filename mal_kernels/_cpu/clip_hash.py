"""The hash of the frames of a clip: launcher of ``csrc/cpu/clip_hash.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import launch


def clip_hash(words: Tensor, key: Tensor) -> Tensor:
    """NH, int64 ``[T]``, of int32 ``words`` ``[T, K]`` under ``key`` ``[K]``; ``K`` is even."""
    if 1 not in words.stride():
        words = words.contiguous()
    frames, count = words.shape
    hashes = torch.empty(frames, dtype=torch.int64)
    fields = dict(T=frames, K=count, step_t=words.stride(0), step_k=words.stride(1))
    launch("mal_cpu_clip_hash", {**fields, "words": words, "key": key, "hashes": hashes})
    return hashes
