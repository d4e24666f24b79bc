"""The write and the causal read: launcher of ``csrc/memory_update.cu``."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from . import library

Fields: TypeAlias = dict[str, Tensor | int | float | None]

ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu": 3}


def memory_fwd(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    weights: list[Tensor],
    trace: list[Tensor],
    anchor: list[Tensor],
    init: list[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    step: str,
    activation: str,
    residual_norm: bool,
    max_grad_norm: float | None,
    *,
    keeps: bool,
    tiles: tuple[list[Tensor], list[Tensor], Tensor | None] = ([], [], None),
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Output, surprise, next weights, momentum, anchor and position.

    The output is empty without ``q``, anchor and position unless ``keeps``. ``tiles``: weights and
    momentum ``[tiles, H, ...]`` to fill with the state before every tile of tokens, and each row's
    first tile.
    """
    size = chunk_size or max(k.shape[1], 1)
    new_weights, new_trace = ([w.new_empty(w.shape) for w in weights] for _ in range(2))
    # where no row opens a chunk, the anchor stays what it was
    new_anchor = [w.clone(memory_format=torch.contiguous_format) for w in anchor or weights]
    surprise = lr.new_empty(lr.shape, dtype=torch.float32)
    output = k.new_empty(0 if q is None else q.shape)
    library.launch(
        "mal_memory_update",
        k.device,
        **call_fields(
            *(q, k, v, lr, momentum, decay, weights, trace, anchor, init, position, cu_seqlens),
            *(chunk_size, step, activation, residual_norm, max_grad_norm),
        ),
        **state_fields("new_weights", new_weights, residual_norm),
        **state_fields("new_trace", new_trace, residual_norm),
        **state_fields("new_anchor", new_anchor if keeps else [], residual_norm),
        **state_fields("tile_weights", tiles[0], residual_norm),
        **state_fields("tile_trace", tiles[1], residual_norm),
        first_tile=tiles[2],
        output=None if q is None else output,
        surprise=surprise,
    )
    result = (output, surprise, new_weights, new_trace)
    if not keeps:
        return *result, [], k.new_empty(0, dtype=torch.int64)
    return *result, new_anchor, next_position(len(weights[0]), k, size, position, cu_seqlens)


def call_fields(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    weights: list[Tensor],
    trace: list[Tensor],
    anchor: list[Tensor],
    init: list[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    step: str,
    activation: str,
    residual_norm: bool,
    max_grad_norm: float | None,
) -> Fields:
    """The fields of ``mal_memory_call``."""
    rows, heads, dim, hidden = weights[0].shape
    size = chunk_size or max(k.shape[1], 1)
    return dict(
        dtype=library.DTYPES[k.dtype],
        rows=rows,
        T=k.shape[1],
        H=heads,
        D=dim,
        E=hidden,
        chunk_size=min(size, 2**30),
        chunk_gates=max(-(-k.shape[1] // size), 1),
        token_steps=step == "token",
        activation=ACTIVATIONS[activation],
        max_grad_norm=float(max_grad_norm or 0),
        q=None if q is None else q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        lr=lr.float().contiguous(),
        momentum=None if momentum is None else momentum.float().contiguous(),
        decay=None if decay is None else decay.float().contiguous(),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long().contiguous(),
        first_gate=first_gates(cu_seqlens, size) if step == "chunk" else None,
        position=None if position is None else position.contiguous(),
        **state_fields("weights", weights, residual_norm),
        **state_fields("trace", trace, residual_norm),
        **state_fields("anchor", anchor, residual_norm),
        **state_fields("init", init, residual_norm),
    )


def state_fields(name: str, tensors: list[Tensor], residual_norm: bool) -> Fields:
    """The fields of the ``mal_state`` called ``name``; all absent for an empty list."""
    *layers, gain = [x.contiguous() for x in tensors] + [None] * (not residual_norm or not tensors)
    first, last = ([None] * 2 + layers)[-2:]
    return {f"{name}_first": first, f"{name}_last": last, f"{name}_gain": gain}


def first_gates(cu_seqlens: Tensor | None, size: int) -> Tensor | None:
    """``[N]``: each ragged row's first chunk gate; every row has at least one."""
    if cu_seqlens is None:
        return None
    counts = (-(-cu_seqlens.diff().long() // size)).clamp(min=1)
    return counts.cumsum(0) - counts


def next_position(
    rows: int, k: Tensor, size: int, position: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """``[rows]`` int64: where each row stands in its chunk after its last token."""
    if cu_seqlens is None:
        lengths = torch.full((rows,), k.shape[1], dtype=torch.int64, device=k.device)
    else:
        lengths = cu_seqlens.diff().long()
    return (lengths if position is None else lengths + position) % size
