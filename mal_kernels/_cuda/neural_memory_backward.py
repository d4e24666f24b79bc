"""Backward of the write: launcher of ``csrc/memory_update_bwd.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import library
from .neural_memory import Call, memory_fwd, state_fields

TILE = 64  # tokens, kTokens of csrc/memory_update.h


def memory_bwd(
    d_surprise: Tensor,
    d_weights: list[Tensor],
    d_trace: list[Tensor],
    d_anchor: list[Tensor],
    call: Call,
) -> list[Tensor]:
    """Gradients of the tensors that are given, in order.

    The write is run again and keeps the state before every tile of 64 tokens, or of a chunk where
    chunks are shorter.
    """
    call = call._replace(q=None)
    _, k, v, lr, momentum, decay, weights, trace, anchor, init, *_ = call
    first_tile, count = tiles(call)
    kept = [[w.new_empty(count, *w.shape[1:]) for w in weights] for _ in range(2)]
    memory_fwd(call, keeps=False, tiles=(kept[0], kept[1], first_tile))
    d_k, d_v = (x.new_empty(x.shape) for x in (k, v))
    d_lr = lr.new_empty(lr.shape, dtype=torch.float32)
    # a row without tokens has a chunk gate and no tile
    d_gates = [
        None if g is None else g.new_zeros(g.shape, dtype=torch.float32) for g in (momentum, decay)
    ]
    d_state = [[w.new_empty(w.shape) for w in x] for x in (weights, trace, anchor)]
    d_init = [w.new_zeros(w.shape) for w in init]
    states = dict(
        tile_weights=kept[0],
        tile_trace=kept[1],
        d_new_weights=d_weights,
        d_new_trace=d_trace,
        d_new_anchor=d_anchor,
        d_weights=d_state[0],
        d_trace=d_state[1],
        d_anchor=d_state[2],
        d_init=d_init,
    )
    fields = {name: state_fields(name, x, call.residual_norm) for name, x in states.items()}
    library.launch(
        "mal_memory_update_bwd",
        k.device,
        **call.fields(),
        **fields["tile_weights"],
        **fields["tile_trace"],
        first_tile=first_tile,
        d_surprise=d_surprise.contiguous(),
        **fields["d_new_weights"],
        **fields["d_new_trace"],
        **fields["d_new_anchor"],
        d_k=d_k,
        d_v=d_v,
        d_lr=d_lr,
        d_momentum=d_gates[0],
        d_decay=d_gates[1],
        **fields["d_weights"],
        **fields["d_trace"],
        **fields["d_anchor"],
        **fields["d_init"],
    )
    gates = zip((lr, momentum, decay), (d_lr, *d_gates), strict=True)
    d_given = [d.to(g.dtype) for g, d in gates if g is not None and d is not None]
    return [d_k, d_v, *d_given, *(w for x in (*d_state, d_init) for w in x)]


def tiles(call: Call) -> tuple[Tensor, int]:
    """``[rows]`` int64: each row's first tile among those of all rows; and a bound of their number.

    A tile ends where its chunk or its row ends, so besides those of whole chunks a row has at most
    one that is not full, and one more if it begins inside a chunk.
    """
    size, rows, position = call.size, call.rows, call.position
    per_chunk = -(-size // TILE)
    bound = call.k.shape[:2].numel() * per_chunk // size + rows * (1 if position is None else 2)
    lengths = call.lengths()
    before = lengths.new_zeros(rows) if position is None else -position % size
    before = torch.minimum(before, lengths)  # tokens of a row's first chunk, if it is inside one
    rest = lengths - before
    counts = -(-before // TILE) + rest // size * per_chunk + -(-(rest % size) // TILE)
    return counts.cumsum(0) - counts, bound
