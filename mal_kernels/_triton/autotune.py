"""Timing a few tile sizes against each other, for those who ask for it.

By default a kernel's tiles follow from its sizes (:func:`.tiles.tile_sizes`), the same on every run
and nothing timed. With ``MAL_AUTOTUNE=1`` the launchers of the reads time each of
:func:`configurations` once per static size, at first use outside a CUDA graph, and keep the fastest
for the process. That synchronises the device, and results may then differ between processes in
their last digits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton

Configuration = dict[str, Any]
_fastest: dict[Hashable, Configuration] = {}


def configurations(pinned: Configuration, dtype: torch.dtype) -> list[Configuration]:
    """Returns the choices, ``pinned`` first: fewer tokens a tile, another pipeline depth.

    Not the latter for float32, where the registers are full.
    """
    others = [{"BT": max(16, pinned["BT"] // 2)}]
    if dtype.itemsize == 2:
        others.append({"num_stages": 3 - pinned["num_stages"]})
    return [pinned, *(c for c in (pinned | other for other in others) if c != pinned)]


def fastest(
    tokens: torch.Tensor, choices: list[Configuration], launch: Callable[[Configuration], Any]
) -> Configuration:
    """The pinned configuration, or with ``MAL_AUTOTUNE=1`` the fastest.

    Args:
        tokens: tell the device and the dtype.
        choices: all static arguments of the kernels, the pinned choice first.
        launch: runs them, into memory that may be written more than once.
    """
    if os.environ.get("MAL_AUTOTUNE") != "1":
        return choices[0]
    if tokens.device.type == "meta":  # compiled ahead of time: whatever could be chosen
        for choice in choices[1:]:
            launch(choice)
        return choices[0]
    key = (launch.__qualname__, tokens.dtype, *choices[0].items())
    if key not in _fastest:
        if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            return choices[0]
        times = [milliseconds(tokens, lambda c=c: launch(c)) for c in choices]
        _fastest[key] = choices[times.index(min(times))]
    return _fastest[key]


def milliseconds(tokens: torch.Tensor, launch: Callable[[], Any]) -> float:
    """Median of some launches; in the interpreter the time of one."""
    if tokens.is_cuda:
        return triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median")
    start = time.perf_counter()
    launch()
    return 1e3 * (time.perf_counter() - start)
