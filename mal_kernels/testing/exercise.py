"""Small calls of every op on odd shapes, for tools that watch kernels from outside.

compute-sanitizer is one: it slows a kernel down a thousandfold, so what it watches has to be small,
and still has to meet every edge: part chunks, empty rows, widths that no tile divides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import BackendUnavailable
from ..state import MemoryState
from .numerics import Inputs, make_inputs


def run_small(op: str, backend: str, device: str = "cpu") -> None:
    """Calls an op forward and, where the backend has one, backward, on small odd shapes."""
    for call in small_calls(op, backend, device):
        try:
            results = [x for x in call() if x.is_floating_point()]
            torch.autograd.backward([x.sum() for x in results if x.requires_grad])
        except BackendUnavailable:
            with torch.no_grad():
                call()


def small_calls(op: str, backend: str, device: str = "cpu") -> Iterator[Callable[[], list[Tensor]]]:
    """The calls that :func:`run_small` makes; each returns the tensors of its result."""
    if op == "aligned_residual_read":
        yield functools.partial(_aligned, backend, device)
    elif op == "momentum_scan":
        for shape in ((2, 37, 2, 20), (1, 9, 1, 520), (1, 600, 1, 1)):
            yield functools.partial(_scan, backend, device, shape)
    else:
        for case in (
            dict(tokens=37, chunk_size=16, residual_norm=True, max_grad_norm=0.5, init=True),
            dict(lengths=[3, 0, 18], chunk_size=None, step="chunk"),
            dict(tokens=70, hidden=136, chunk_size=None),
            dict(depth=1, tokens=1, chunk_size=16),
        ):
            sizes: Any = dict(head_dim=24, hidden=40, heads=1, dtype=torch.bfloat16)
            inputs = make_inputs(**(sizes | case)).map(lambda x: x.to(device).requires_grad_())
            yield functools.partial(_memory, op, backend, inputs)


def _aligned(backend: str, device: str) -> list[Tensor]:
    width, heads, dim, hidden, rows, length = 32, 1, 16, 16, 2, 16
    index = torch.arange(rows * length, device=device)
    state = MemoryState.from_weights(
        (
            torch.randn(rows, heads, dim, hidden, device=device) / dim**0.5,
            torch.randn(rows, heads, hidden, dim, device=device) / hidden**0.5,
        )
    )
    shapes = ((width,), (heads * dim, width), (heads * dim, width), (width, heads * dim))
    params = ops.ReadParams(*(torch.randn(*shape, device=device) for shape in shapes))
    # as much text as audio
    states = torch.randn(1, 2 * len(index), width, device=device).bfloat16().requires_grad_()
    return [
        ops.aligned_residual_read(
            states, 2 * index, index // length, state, params, backend=backend
        )
    ]


def _scan(backend: str, device: str, shape: tuple[int, ...]) -> list[Tensor]:
    update = torch.randn(*shape, device=device, requires_grad=True)
    gate = torch.rand(*shape[:3], device=device)
    return [*ops.momentum_scan(update, gate, gate, backend=backend)]


def _memory(op: str, backend: str, inputs: Inputs) -> list[Tensor]:
    options = inputs.options | {"backend": backend}
    if "cu_seqlens" in options:
        options["cu_seqlens"] = options["cu_seqlens"].to(inputs.q.device)
    given: Any = inputs[:7]
    if op == "memory_read":
        names = {"activation", "residual_norm", "cu_seqlens", "backend"} & set(options)
        return [ops.memory_read(inputs.q, inputs.state, **{n: options[n] for n in names})]
    if op == "memory_update":
        new, surprise = ops.memory_update(*given[1:], **options)
        return [surprise, *new.tensors()]
    output, new, surprise = ops.neural_memory(*given, **options)
    return [output, surprise, *new.tensors()]
