"""How much memory does training on T tokens take? The peak of a fresh process."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence

import torch

from bench import Result
from bench.cases import Case
from bench.machine import peak_rss, run_python
from bench.providers import PROVIDERS, SWEPT, Workload


def ask(quick: bool, say: Callable[[str], None]) -> Result:
    """Peaks at several lengths, and bytes per token: the slope of a line through them."""
    tokens = (64, 128) if quick else (256, 512, 1024)
    result = {}
    for provider in SWEPT:
        say(provider.name)
        call = f"print_peaks({provider.name!r}, {tokens}, {torch.get_num_threads()})"
        printed = run_python(f"from bench.questions.memory import *; {call}")
        peaks = {int(t): int(x) for t, x in json.loads(printed).items()}
        slope = statistics.linear_regression(list(peaks), list(peaks.values())).slope
        result[provider.name] = {"peak_bytes": peaks, "bytes_per_token": slope}
    return result


def print_peaks(provider: str, tokens: Sequence[int], threads: int) -> None:
    """JSON of the peak of this process after forward and backward of ascending lengths."""
    torch.set_num_threads(threads)
    peaks = {}
    for t in tokens:
        Workload(PROVIDERS[provider], Case("memory", tokens=t)).forward_backward()
        peaks[t] = peak_rss()
    print(json.dumps(peaks))
