"""Times of functions that take turns: by CUDA events on a GPU, by a CPU's clock in a dry run.

Before every timed call the L2 cache is overwritten, so that a repeated call does not find its own
data there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.interleaved import Functions, Quantiles, in_turns, quantiles


class Stopwatch:
    """Measures on ``device``: ``"cuda"``, or ``"cpu"`` in a dry run, where nothing is captured."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def in_turns(self, functions: Functions) -> dict[str, Quantiles]:
        """Quantiles in milliseconds: :func:`bench.interleaved.in_turns`."""
        if self.on_gpu:
            found = in_turns(functions, once=self._once)
        else:
            found = in_turns(functions, seconds=0, rounds=1)
        return {name: quantiles(ms) for name, ms in found.items()}

    def _once(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        """``function`` as the replay of a CUDA graph; itself in a dry run."""
        if not self.on_gpu:
            return function
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = function()

        def replay() -> object:
            graph.replay()
            return kept

        return replay

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        """Device memory that one call takes at its peak, besides what was allocated before."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
