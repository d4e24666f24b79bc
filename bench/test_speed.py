"""Every op at one real size, for pytest-benchmark: ``pytest bench/ --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import CASES, DECODE, HOSTS, Case, OpCase, layer_ops, turn_ops
from bench.providers import OURS, OURS_CHUNK, Provider, Workload

pytest.importorskip("pytest_benchmark")
OPS = turn_ops(HOSTS[-1], 1) + layer_ops(CASES[0])


@pytest.mark.parametrize("case", OPS, ids=lambda case: f"{case.op}, {case.where}")
def test_op(benchmark: Any, case: OpCase) -> None:
    """Forward alone."""
    with torch.no_grad():
        benchmark(case.call)


@pytest.mark.parametrize("kind", ["forward", "forward_backward"])
@pytest.mark.parametrize("provider", [OURS, OURS_CHUNK], ids=lambda provider: provider.step)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layer(benchmark: Any, case: Case, provider: Provider, kind: str) -> None:
    """The causal layer with token and with chunk steps."""
    benchmark(getattr(Workload(provider, case), kind))


def test_decode(benchmark: Any) -> None:
    """One token of a stream."""
    benchmark(Workload(OURS, DECODE).forward)
