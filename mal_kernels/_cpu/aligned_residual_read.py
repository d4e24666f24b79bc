"""The read of a turn: launcher of ``csrc/cpu/aligned_residual_read.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native.packing import DTYPES
from ..call import AlignedCall
from .library import launch
from .memory_read import read_fields


def aligned_fwd(call: AlignedCall, *, in_place: bool = False) -> Tensor:
    """``hidden`` ``[B, S, Dm]`` with the residual added at ``token_index``.

    A new tensor, the other rows copied; ``in_place`` writes a contiguous ``hidden`` itself.

    Raises:
        BadValues: an index is out of bounds, or a token named twice.
    """
    hidden, tokens = call.hidden, len(call.token_index)
    out = hidden if in_place else hidden.clone(memory_format=torch.contiguous_format)
    norm, w_q, w_gate, w_out = (p.float().contiguous() for p in call.params)
    read = read_fields(0, tokens, call.weights, call.activation, call.residual_norm)
    sizes = dict(N=tokens, Dm=hidden.shape[2], positions=hidden.shape[:2].numel())
    fields = dict(
        **{f"read_{name}": x for name, x in read.items()},
        dtype=DTYPES[hidden.dtype],
        **sizes,
        hidden=out,
        token_index=call.token_index.contiguous(),
        state_index=call.state_index.contiguous(),
        norm=norm,
        w_q=w_q,
        w_gate=w_gate,
        w_out=w_out,
        output=out,
    )
    launch("mal_cpu_aligned_residual_read_fwd", fields)
    return out
