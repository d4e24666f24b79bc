"""The read of a turn: launcher of ``csrc/aligned_residual_read.cu``.

Computes :func:`mal_kernels.reference.aligned_residual_read` in one launch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._native.packing import ACTIVATIONS, DTYPES, state_fields
from ..call import AlignedCall
from . import library
from .library import aligned, readable

# as in csrc/aligned_residual_read.h
ROWS, COLUMNS, DEPTH = 64, 64, 64
SPLITS = 16


def aligned_fwd(call: AlignedCall, *, in_place: bool = False) -> Tensor:
    """``hidden`` ``[B, S, Dm]`` with the residual added at ``token_index``.

    A new tensor, the other rows copied; ``in_place`` writes a contiguous ``hidden`` itself.
    """
    hidden, weights, params = call.hidden, call.weights, call.params
    out = aligned(hidden) if in_place else hidden.clone(memory_format=torch.contiguous_format)
    tokens, width = len(call.token_index), hidden.shape[2]
    heads, dim = weights[0].shape[1:3]
    # parameters of one dtype: float32, unless all have that of the host
    own = all(p.dtype == hidden.dtype for p in params)
    norm, w_q, w_gate, w_out = (aligned(p if own else p.float()) for p in params)
    blocks = multiprocessors(hidden.device)
    splits = parts(-(-tokens // ROWS) * 2 * -(-heads * dim // COLUMNS), -(-width // DEPTH), blocks)
    library.launch(
        "mal_aligned_residual_read",
        hidden.device,
        dtype=DTYPES[hidden.dtype],
        param_dtype=DTYPES[norm.dtype],
        tokens=tokens,
        width=width,
        H=heads,
        D=dim,
        E=weights[0].shape[3],
        activation=ACTIVATIONS[call.activation],
        splits=splits,
        blocks=blocks,
        hidden=out,
        token_index=call.token_index.contiguous(),
        state_index=call.state_index.contiguous(),
        norm=norm,
        w_q=w_q,
        w_gate=w_gate,
        w_out=w_out,
        **readable(state_fields("weights", weights, call.residual_norm)),
        z=out.new_empty(splits, tokens, 2 * heads * dim, dtype=torch.float32),
        squares=out.new_empty(splits, tokens, dtype=torch.float32),
        a=out.new_empty(tokens, heads * dim),
    )
    return hidden.copy_(out) if in_place and out is not hidden else out


@functools.cache
def parts(tiles: int, slabs: int, blocks: int) -> int:
    """Into how many parts the projections split their sum over the host's features.

    More parts keep more blocks busy, but each is written and read again. What it takes ``blocks``
    to go through ``tiles`` of ``slabs`` each is estimated, in slabs: a part of a tile costs one
    more to begin with, and half of one to be summed, by half of the blocks if tiles are few. On
    ties the fewest.

    Example:
        >>> from mal_kernels._cuda.aligned_residual_read import parts
        >>> parts(tiles=16, slabs=64, blocks=132), parts(tiles=264, slabs=64, blocks=132)
        (8, 1)
    """

    def time(splits: int) -> float:
        rounds = -(-tiles * splits // blocks)
        return rounds * (-(-slabs // splits) + 1) + splits / 2 * max(tiles / blocks, 1 / 2)

    return min(range(1, min(slabs, SPLITS) + 1), key=time)


def multiprocessors(device: torch.device) -> int:
    """How many the GPU has: a block is launched for each."""
    return torch.cuda.get_device_properties(device).multi_processor_count
