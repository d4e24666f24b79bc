"""How the portable backend computes: outside of autocast, and without denormals."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST = sys.float_info.min  # half of it is a denormal
_started = threading.local()  # how many threads torch has started for this one


@contextlib.contextmanager
def portable(device: torch.device) -> Iterator[None]:
    """Inside, a surrounding autocast is off and denormals are zero; both come back at the end.

    State and accumulators are float32 whatever autocast wants. A memory that fades, and products of
    many momenta, fall below 1e-38, where processors compute many times slower.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cpu" or flushes_denormals():
            yield
            return
        _start_threads()
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)


def flushes_denormals() -> bool:
    """Whether this thread does; torch cannot be asked, but Python's products obey the same flag."""
    return SMALLEST * 0.5 == 0.0


def _start_threads() -> None:
    """Starts torch's worker threads while denormals are kept.

    A worker inherits the flag of the moment when it is started, and keeps it for good.
    """
    threads = torch.get_num_threads()
    if getattr(_started, "threads", 1) < threads:
        torch.empty(2**17).fill_(0)  # more than one thread takes at a time
        _started.threads = threads


def fresh(x: Tensor) -> Tensor:
    """A contiguous copy: outputs alias nothing and have the strides that the fake promises."""
    return x.clone(memory_format=torch.contiguous_format)


def per_head(gate: Tensor, like: Tensor) -> Tensor:
    """``gate`` with trailing dimensions of 1 up to the rank of ``like``."""
    return gate.reshape(*gate.shape, *(1,) * (like.ndim - gate.ndim))
