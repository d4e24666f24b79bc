"""Launchers of ``csrc/cpu/memory_read.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native.packing import ACTIVATIONS, DTYPES, Fields, state_fields
from ..call import ReadCall
from .library import launch


def read_fwd(call: ReadCall) -> Tensor:
    """``[B, T, H, D]`` in the dtype of ``q``."""
    output = call.q.new_empty(call.q.shape)
    launch("mal_cpu_memory_read_fwd", dict(**_fields(call), output=output))
    return output


def read_bwd(d_output: Tensor, call: ReadCall) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``q`` and of every tensor of ``weights``."""
    d_q = call.q.new_empty(call.q.shape)
    d_weights = [w.new_empty(w.shape) for w in call.weights]
    fields = dict(
        **_fields(call),
        d_output=d_output.contiguous(),
        d_q=d_q,
        **state_fields("d_weights", d_weights, call.residual_norm),
    )
    launch("mal_cpu_memory_read_bwd", fields)
    return d_q, d_weights


def _fields(call: ReadCall) -> Fields:
    cu_seqlens = call.cu_seqlens
    return read_fields(
        *(DTYPES[call.q.dtype], call.q.shape[1], call.weights),
        *(call.activation, call.residual_norm),
        q=call.q.contiguous(),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long().contiguous(),
    )


def read_fields(
    dtype: int,
    tokens: int,
    weights: list[Tensor],
    activation: str,
    residual_norm: bool,
    q: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Fields:
    """The fields of ``mal_cpu_memory_read``."""
    rows, heads, dim, hidden = weights[0].shape
    return dict(
        dtype=dtype,
        rows=rows,
        T=tokens,
        H=heads,
        D=dim,
        E=hidden,
        activation=ACTIVATIONS[activation],
        threads=torch.get_num_threads(),
        q=q,
        cu_seqlens=cu_seqlens,
        **state_fields("weights", weights, residual_norm),
    )
