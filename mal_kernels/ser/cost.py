"""The cost of the memory per turn is measured through the hooks that a user has."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .host import EncodedDialogue
from .model import DialogueModel
from .stream import play

WARM_UP = 3  # turns


@torch.no_grad()
def cost(
    model: DialogueModel, dialogues: Sequence[EncodedDialogue], turns: int = 40
) -> dict[str, Any]:
    """Latency of a turn with and without memory, size of the state, and peak memory.

    One dialogue at a time, turn by turn, the host called once per turn. The encoder of the host is
    not in it: it runs the same with and without.

    Args:
        model: with a memory of :class:`MALAdapter`.
        dialogues: to play.
        turns: to time, after some that warm up.

    Returns:
        Median milliseconds and their 80th percentile, bytes per speaker, peak bytes.
    """
    adapter = model.adapter()
    times: dict[bool, list[float]] = {True: [], False: []}
    for enabled in times:
        stream = play(model, dialogues, enabled=enabled)
        for _ in range(turns + WARM_UP):
            start = time.perf_counter()
            if next(stream, None) is None:
                break
            times[enabled].append(1e3 * (time.perf_counter() - start))
        stream.close()
    host, both = (np.array(t[min(WARM_UP, len(t) - 1) :]) for t in (times[False], times[True]))
    return {
        "turns": len(both),
        "host_ms": float(np.median(host)),
        "host_ms_p80": float(np.quantile(host, 0.8)),
        "memory_ms": float(np.median(both) - np.median(host)),
        "with_memory_ms_p80": float(np.quantile(both, 0.8)),
        "state_bytes_per_speaker": sum(t.nbytes for t in adapter.initial(1)),
        "peak_bytes": peak_bytes(),
        "device": str(next(model.parameters()).device),
    }


def peak_bytes() -> int:
    """Most memory so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # of Unix alone

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
