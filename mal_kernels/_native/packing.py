"""Arguments of a library's function: one struct of fields that are 8 bytes wide.

Its fields by name, in order, are those of a struct of ``csrc/mal_kernels.h``.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TypeAlias

import torch
from torch import Tensor

from ..call import MemoryCall, n_chunks

Fields: TypeAlias = dict[str, Tensor | int | float | None]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # mal_dtype of mal_kernels.h
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu": 3}


class BadValues(ValueError):
    """A kernel found gates or indices out of bounds; the op, which knows the names, says which."""


def call(library: ctypes.CDLL, function: str, **fields: Tensor | int | float | None) -> int:
    """The function's error, 0 if there is none."""
    words = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in fields.values()]
    if function not in _layouts:
        kinds = "".join("d" if isinstance(x, float) else "q" for x in fields.values())
        _layouts[function] = struct.Struct("=" + kinds)
    return getattr(library, function)(_layouts[function].pack(*words))


_layouts: dict[str, struct.Struct] = {}  # of a function's struct: every field is 8 bytes


def word(x: Tensor | int | float | None) -> bytes:
    """A field of a struct: 8 bytes."""
    if isinstance(x, Tensor):
        return struct.pack("=Q", x.data_ptr())
    return struct.pack("=d", x) if isinstance(x, float) else struct.pack("=q", x or 0)


def shapes(fields: Fields) -> str:
    """The fields for people."""
    return ", ".join(
        f"{name} {list(x.shape)}" if isinstance(x, Tensor) else f"{name} {x}"
        for name, x in fields.items()
    )


def call_fields(c: MemoryCall) -> Fields:
    """The fields of ``mal_memory_call``."""
    rows, heads, dim, hidden = c.weights[0].shape
    return dict(
        dtype=DTYPES[c.k.dtype],
        rows=rows,
        T=c.k.shape[1],
        H=heads,
        D=dim,
        E=hidden,
        chunk_size=min(c.size, 2**30),
        chunk_gates=n_chunks(c.k.shape[1], c.size),
        token_steps=c.step == "token",
        activation=ACTIVATIONS[c.activation],
        max_grad_norm=float(c.max_grad_norm or 0),
        q=None if c.q is None else c.q.contiguous(),
        k=c.k.contiguous(),
        v=c.v.contiguous(),
        lr=c.lr.float().contiguous(),
        momentum=None if c.momentum is None else c.momentum.float().contiguous(),
        decay=None if c.decay is None else c.decay.float().contiguous(),
        cu_seqlens=None if c.cu_seqlens is None else c.cu_seqlens.long().contiguous(),
        first_gate=c.first_gates() if c.step == "chunk" else None,
        position=None if c.position is None else c.position.contiguous(),
        **state_fields("weights", c.weights, c.residual_norm),
        **state_fields("trace", c.trace, c.residual_norm),
        **state_fields("anchor", c.anchor, c.residual_norm),
        **state_fields("init", c.init, c.residual_norm),
    )


def state_fields(name: str, tensors: list[Tensor], residual_norm: bool) -> Fields:
    """The fields of the ``mal_state`` called ``name``; all absent for an empty list."""
    *layers, gain = [x.contiguous() for x in tensors] + [None] * (not residual_norm or not tensors)
    first, last = ([None] * 2 + layers)[-2:]
    return {f"{name}_first": first, f"{name}_last": last, f"{name}_gain": gain}
