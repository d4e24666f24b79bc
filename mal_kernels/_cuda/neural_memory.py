"""The write and the causal read: launcher of ``csrc/neural_memory_fwd.cu``."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from ..call import MemoryCall, n_chunks
from . import library

Fields: TypeAlias = dict[str, Tensor | int | float | None]

ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu": 3}


def call_fields(c: MemoryCall) -> Fields:
    """The fields of ``mal_memory_call``."""
    rows, heads, dim, hidden = c.weights[0].shape
    return dict(
        dtype=library.DTYPES[c.k.dtype],
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


def memory_fwd(
    call: MemoryCall,
    *,
    keeps: bool | None = None,
    tiles: tuple[list[Tensor], list[Tensor], Tensor | None] = ([], [], None),
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Output, surprise, next weights, momentum, anchor and position.

    The output is empty without queries, anchor and position unless ``keeps``. ``tiles``: weights
    and momentum ``[tiles, H, ...]`` to fill with the state before every tile of tokens, and each
    row's first tile.
    """
    k, norm = call.k, call.residual_norm
    keeps = call.keeps_position if keeps is None else keeps
    new_weights, new_trace = ([w.new_empty(w.shape) for w in call.weights] for _ in range(2))
    # where no row opens a chunk, the anchor stays what it was
    anchor = call.anchor or call.weights
    new_anchor = [w.clone(memory_format=torch.contiguous_format) for w in anchor]
    surprise = k.new_empty(call.lr.shape, dtype=torch.float32)
    output = k.new_empty(0 if call.q is None else call.q.shape)
    library.launch(
        "mal_neural_memory_fwd",
        k.device,
        **call_fields(call),
        **state_fields("new_weights", new_weights, norm),
        **state_fields("new_trace", new_trace, norm),
        **state_fields("new_anchor", new_anchor if keeps else [], norm),
        **state_fields("tile_weights", tiles[0], norm),
        **state_fields("tile_trace", tiles[1], norm),
        first_tile=tiles[2],
        output=None if call.q is None else output,
        surprise=surprise,
    )
    result = (output, surprise, new_weights, new_trace)
    if not keeps:
        return *result, [], k.new_empty(0, dtype=torch.int64)
    return *result, new_anchor, call.next_position()


def state_fields(name: str, tensors: list[Tensor], residual_norm: bool) -> Fields:
    """The fields of the ``mal_state`` called ``name``; all absent for an empty list."""
    *layers, gain = [x.contiguous() for x in tensors] + [None] * (not residual_norm or not tensors)
    first, last = ([None] * 2 + layers)[-2:]
    return {f"{name}_first": first, f"{name}_last": last, f"{name}_gain": gain}
