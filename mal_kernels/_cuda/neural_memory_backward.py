"""Backward of the causal read and of the write, from the state before every tile.

Launcher of ``csrc/causal_read_bwd.cu`` and ``csrc/write_bwd.cu``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._native.packing import Fields, call_fields, state_fields
from ..call import MemoryCall
from . import library

TILE = 64  # tokens, kTokens of csrc/neural_memory.h


class Tiles(NamedTuple):
    """Weights and momentum ``[slots, H, ...]`` before every tile of tokens."""

    first: Tensor  # [rows] int64, the slot of each row's first
    slots: int  # no fewer than there are tiles
    weights: list[Tensor]
    trace: list[Tensor]


def read_bwd(d_output: Tensor, call: MemoryCall, before: Tiles, to: Fields) -> Tensor:
    """Gradient of the queries; fills what :func:`write_bwd` has to add."""
    d_q = d_output.new_empty(d_output.shape)
    library.launch(
        "mal_causal_read_bwd",
        call.k.device,
        **library.readable(call_fields(call)),
        tiles=before.slots,
        **state_fields("tile_weights", before.weights, call.residual_norm),
        **state_fields("tile_trace", before.trace, call.residual_norm),
        first_tile=before.first,
        d_output=library.aligned(d_output),
        d_q=d_q,
        **{f"to_{name}": x for name, x in to.items()},
    )
    return d_q


def read_gradients(call: MemoryCall, slots: int) -> Fields:
    """The fields of a ``mal_read_gradients``, to be filled; all absent without queries."""
    k, weights, is_deep = call.k, call.weights, len(call.weights) - call.residual_norm == 2
    by_token = call.q is not None and call.step == "token"
    dim, hidden = weights[0].shape[2:]

    def states(wanted: bool) -> list[Tensor]:
        return [w.new_empty(slots, *w.shape[1:]) for w in weights if wanted]

    def tokens(*width: int, wanted: bool = True) -> Tensor | None:
        if not by_token or not wanted:
            return None
        return k.new_empty(*k.shape[:3], *width, dtype=torch.float32)

    states_of = dict(
        tile_weights=states(call.q is not None),
        tile_trace=states(by_token),
        tile_init=states(by_token and bool(call.init)),
    )
    fields: Fields = {}
    for name, x in states_of.items():
        fields |= state_fields(name, x, call.residual_norm)
    return fields | dict(
        rate=tokens(),
        momentum=tokens(wanted=call.momentum is not None),
        decay=tokens(wanted=call.decay is not None),
        k=tokens(dim, wanted=is_deep),
        h=tokens(hidden),
        d1=tokens(hidden, wanted=is_deep),
        d2=tokens(dim),
        gain=tokens(dim, wanted=call.residual_norm),
    )


def write_bwd(
    d_surprise: Tensor,
    d_weights: list[Tensor],
    d_trace: list[Tensor],
    d_anchor: list[Tensor],
    call: MemoryCall,
    before: Tiles,
    read: Fields,
) -> list[Tensor]:
    """Gradients of all but the queries, with what ``read`` holds."""
    _, k, v, lr, momentum, decay, weights, trace, anchor, init, *_ = call
    d_k, d_v = (x.new_empty(x.shape) for x in (k, v))
    d_lr = lr.new_empty(lr.shape, dtype=torch.float32)
    # a row without tokens has a chunk gate and no tile
    d_gates = [
        None if g is None else g.new_zeros(g.shape, dtype=torch.float32) for g in (momentum, decay)
    ]
    d_state = [[w.new_empty(w.shape) for w in x] for x in (weights, trace, anchor)]
    d_init = [w.new_zeros(w.shape) for w in init]
    states = dict(
        tile_weights=before.weights,
        tile_trace=before.trace,
        d_new_weights=d_weights,
        d_new_trace=d_trace,
        d_new_anchor=d_anchor,
        d_weights=d_state[0],
        d_trace=d_state[1],
        d_anchor=d_state[2],
        d_init=d_init,
    )
    fields = {name: state_fields(name, x, call.residual_norm) for name, x in states.items()}
    for name in ("d_new_weights", "d_new_trace", "d_new_anchor"):  # autograd's
        fields[name] = library.readable(fields[name])
    library.launch(
        "mal_write_bwd",
        k.device,
        **library.readable(call_fields(call)),
        **fields["tile_weights"],
        **fields["tile_trace"],
        first_tile=before.first,
        d_surprise=d_surprise.contiguous(),
        **fields["d_new_weights"],
        **fields["d_new_trace"],
        **fields["d_new_anchor"],
        **{f"read_{name}": x for name, x in read.items()},
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


def tiles_of(call: MemoryCall) -> tuple[Tensor, int]:
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
