"""The write and the causal read, forward and backward.

Launcher of ``csrc/neural_memory_fwd.cu``; those of the backward kernels are in
:mod:`.neural_memory_backward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._native.packing import call_fields, state_fields
from ..call import MemoryCall
from . import library
from .neural_memory_backward import Tiles, read_bwd, read_gradients, tiles_of, write_bwd


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
        **library.readable(call_fields(call)),
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


def memory_bwd(
    d_output: Tensor,
    d_surprise: Tensor,
    d_weights: list[Tensor],
    d_trace: list[Tensor],
    d_anchor: list[Tensor],
    call: MemoryCall,
) -> list[Tensor]:
    """Gradients of the tensors that are given, in order.

    The write is run again and keeps the state before every tile of 64 tokens, or of a chunk where
    chunks are shorter. From there every tile goes back through its reads, and then the walk through
    the writes.
    """
    write = call._replace(q=None)
    first_tile, slots = tiles_of(call)
    kept = [[w.new_empty(slots, *w.shape[1:]) for w in call.weights] for _ in range(2)]
    memory_fwd(write, keeps=False, tiles=(kept[0], kept[1], first_tile))
    before = Tiles(first_tile, slots, *kept)
    d_queries, read = [], read_gradients(call, slots)
    if call.q is not None:
        d_queries = [read_bwd(d_output, call, before, read)]
    return [*d_queries, *write_bwd(d_surprise, d_weights, d_trace, d_anchor, write, before, read)]
