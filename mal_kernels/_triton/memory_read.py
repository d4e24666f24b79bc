"""The read ``y = M(q; W)`` and its gradients. Computes :func:`mal_kernels.reference.memory_read`.

Forward: a program owns one tile of tokens of one row and head, and sums over slices of the hidden
width, so that no more than a slice of ``W`` is on chip. Backward: the same programs recompute and
give ``dq``; then a program owns one slice of one row's and head's weights and walks the row's
tokens, so that ``dW`` is a sum in a fixed order without atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import ReadCall
from .autotune import configurations, fastest
from .tiles import (
    activate,
    activate_derivative,
    dense,
    dot,
    hidden_slice,
    layer_norm,
    layer_norm_bwd,
    load_matrix,
    load_rows,
    meta,
    network,
    power_of_2,
    row_bounds,
    rows_and_tiles,
    store_matrix,
    store_rows,
    tile_of,
    tile_sizes,
)


@triton.jit(do_not_specialize=["T", "N"])
def memory_read_fwd_kernel(
    p_q, p_w1, p_w2, p_gain, p_cu, p_out, T, N,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL_NORM: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """``y = act(q W1) W2``, through LayerNorm and onto ``q`` with RESIDUAL_NORM.

    Grid (tiles of BT tokens, H).
    """
    i_n, o_t, m_t = tile_of(tl.program_id(0), p_cu, T, N, BT, BN, IS_VARLEN)
    i_h = tl.program_id(1).to(tl.int64)
    o_d, o_row, i_w = tl.arange(0, BD), (o_t * H + i_h) * D, i_n * H + i_h
    b_scale = tl.full([BT], 1.0, tl.float32)
    b_q = load_rows(p_q, o_row, m_t, o_d, D)  # [BT, BD]
    b_y = network(
        b_q, p_q, o_row, m_t, b_scale, p_w1 + i_w * (D * E), p_w2 + i_w * (E * D),
        D, E, BD, BE, DEPTH, ACT,
    )  # fmt: skip
    if RESIDUAL_NORM:
        b_gain = 1 + tl.load(p_gain + i_w * D + o_d, mask=o_d < D, other=0.0)
        b_y = b_q.to(tl.float32) + b_gain[None, :] * layer_norm(b_y, o_d < D, D)[0]
    store_rows(p_out, b_y, o_row, m_t, o_d, D)


@triton.jit(do_not_specialize=["T", "N"])
def memory_read_bwd_q_kernel(
    p_dy, p_q, p_w1, p_w2, p_gain, p_cu, p_dq, p_do, p_dgain, T, N,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    DEPTH: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL_NORM: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """``dq = ((do W2ᵀ) ⊙ act'(q W1)) W1ᵀ``; with RESIDUAL_NORM also ``do`` and, per token, ``dγ``.

    Grid (tiles of BT tokens, H), as forward.
    """
    i_n, o_t, m_t = tile_of(tl.program_id(0), p_cu, T, N, BT, BN, IS_VARLEN)
    i_h = tl.program_id(1).to(tl.int64)
    o_d, o_row, i_w = tl.arange(0, BD), (o_t * H + i_h) * D, i_n * H + i_h
    p_w1, p_w2 = p_w1 + i_w * (D * E), p_w2 + i_w * (E * D)
    b_scale = tl.full([BT], 1.0, tl.float32)
    b_q = load_rows(p_q, o_row, m_t, o_d, D)  # [BT, BD]
    b_do = load_rows(p_dy, o_row, m_t, o_d, D)
    b_dq = tl.zeros([BT, BD], tl.float32)
    if RESIDUAL_NORM:
        b_o = network(
            b_q, p_q, o_row, m_t, b_scale, p_w1, p_w2, D, E, BD, BE, DEPTH, ACT
        )  # fmt: skip
        b_normed, b_std = layer_norm(b_o, o_d < D, D)
        b_gain = 1 + tl.load(p_gain + i_w * D + o_d, mask=o_d < D, other=0.0)
        b_dq = b_do.to(tl.float32)
        store_rows(p_dgain, b_dq * b_normed, o_row, m_t, o_d, D)
        b_d = layer_norm_bwd(b_dq * b_gain[None, :], b_normed, b_std, o_d < D, D)
        b_do = b_d.to(b_q.dtype)
        store_rows(p_do, b_do, o_row, m_t, o_d, D)
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        b_dh = dot(b_do, tl.trans(load_matrix(p_w2, o_e, o_d, E, D)))  # [BT, BE]
        if DEPTH == 2:
            b_w1 = load_matrix(p_w1, o_d, o_e, D, E)
            b_dz = b_dh * activate_derivative(dot(b_q, b_w1), ACT)
            b_dq = dot(b_dz.to(b_q.dtype), tl.trans(b_w1), b_dq)
        else:
            if RESIDUAL_NORM:
                b_dh += load_rows(p_dy, o_row, m_t, o_e, D).to(tl.float32)
            store_rows(p_dq, b_dh, o_row, m_t, o_e, D)
    if DEPTH == 2:
        store_rows(p_dq, b_dq, o_row, m_t, o_d, D)


@triton.jit(do_not_specialize=["T"])
def memory_read_bwd_w_kernel(
    p_do, p_dgain, p_q, p_w1, p_w2, p_cu, p_state, p_dw1, p_dw2, p_dgamma, T,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DEPTH: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL_NORM: tl.constexpr, IS_VARLEN: tl.constexpr, IS_INDEXED: tl.constexpr,
):  # fmt: skip
    """``dW1 = Σ_t q_t ⊗ dz_t`` and ``dW2 = Σ_t h_t ⊗ do_t`` of one slice of the hidden width.

    Grid (slices of E, H, rows); the programs of the first slice also sum ``dγ``. A row's tokens lie
    together, or (IS_INDEXED) they are those of all ``T`` for which ``p_state`` names the row.
    """
    i_h, i_n = tl.program_id(1).to(tl.int64), tl.program_id(2)
    if IS_INDEXED:
        begin, end = i_n.to(tl.int64) * 0, i_n.to(tl.int64) * 0 + T
    else:
        begin, end = row_bounds(i_n, p_cu, T, IS_VARLEN)
    i_e, i_w = tl.program_id(0) * BE, i_n.to(tl.int64) * H + i_h
    o_d, o_e = tl.arange(0, BD), i_e + tl.arange(0, BE)
    p_w1, p_w2 = p_w1 + i_w * (D * E), p_w2 + i_w * (E * D)
    b_scale = tl.full([BT], 1.0, tl.float32)
    b_w2 = load_matrix(p_w2, o_e, o_d, E, D)
    b_dw1 = tl.zeros([BD, BE], tl.float32)
    b_dw2 = tl.zeros([BE, BD], tl.float32)
    b_dgamma = tl.zeros([BD], tl.float32)
    for i_t in range(begin, end, BT):
        o_t = i_t + tl.arange(0, BT)
        o_row, m_t = (o_t * H + i_h) * D, o_t < end
        if IS_INDEXED:
            m_t = m_t & (tl.load(p_state + o_t, mask=m_t, other=-1) == i_n)
        b_q = load_rows(p_q, o_row, m_t, o_d, D)
        b_do = load_rows(p_do, o_row, m_t, o_d, D)
        b_h = hidden_slice(b_q, p_q, o_row, m_t, b_scale, p_w1, i_e, D, E, BD, BE, DEPTH)
        if DEPTH == 2:
            b_dh = dot(b_do, tl.trans(b_w2))
            b_dz = (b_dh * activate_derivative(b_h, ACT)).to(b_q.dtype)  # [BT, BE]
            b_dw1 = dot(tl.trans(b_q), b_dz, b_dw1)
            b_h = activate(b_h, ACT)
        b_dw2 = dot(tl.trans(b_h.to(b_q.dtype)), b_do, b_dw2)
        if RESIDUAL_NORM:
            if i_e == 0:
                b_dgamma += tl.sum(load_rows(p_dgain, o_row, m_t, o_d, D), 0)
    store_matrix(p_dw2 + i_w * (E * D), b_dw2, o_e, o_d, E, D)
    if DEPTH == 2:
        store_matrix(p_dw1 + i_w * (D * E), b_dw1, o_d, o_e, D, E)
    if RESIDUAL_NORM:
        if i_e == 0:
            tl.store(p_dgamma + i_w * D + o_d, b_dgamma, mask=o_d < D)


def read_fwd(call: ReadCall) -> Tensor:
    """``[B, T, H, D]`` in the dtype of ``q``."""
    q, cu_seqlens = call.q.contiguous(), dense(call.cu_seqlens)
    w1, w2, gain = layers(call.weights, call.residual_norm)
    static = _static(call)
    out = q.new_empty(q.shape)

    def launch(static: dict[str, Any]) -> None:
        rows, tiles = rows_and_tiles(q, cu_seqlens, static["BT"])
        memory_read_fwd_kernel[(tiles, q.shape[2])](
            q, w1, w2, gain, cu_seqlens, out, q.shape[1], rows, BN=power_of_2(rows), **static
        )

    launch(fastest(q, configurations(static, q.dtype), launch))
    return out


def read_bwd(d_output: Tensor, call: ReadCall) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``q`` and of every tensor of ``weights``."""
    q, d_output, cu_seqlens = call.q.contiguous(), d_output.contiguous(), dense(call.cu_seqlens)
    weights, residual_norm = call.weights, call.residual_norm
    w1, w2, gain = layers(weights, residual_norm)
    static = _static(call)
    rows, tiles = rows_and_tiles(q, cu_seqlens, static["BT"])
    heads, width = q.shape[2], w2.shape[2]
    d_q, d_weights = q.new_empty(q.shape), [w.new_empty(w.shape) for w in weights]
    d_w1, d_w2, d_gamma = layers(d_weights, residual_norm)
    d_o, d_gain = d_output, None
    if residual_norm:
        d_o, d_gain = q.new_empty(q.shape), q.new_empty(q.shape, dtype=torch.float32)
    memory_read_bwd_q_kernel[(tiles, heads)](
        *(d_output, q, w1, w2, gain, cu_seqlens, d_q, d_o, d_gain, q.shape[1], rows),
        BN=power_of_2(rows),
        **static,
    )
    memory_read_bwd_w_kernel[(triton.cdiv(width, static["BE"]), heads, rows)](
        *(d_o, d_gain, q, w1, w2, cu_seqlens, None, d_w1, d_w2, d_gamma, q.shape[1]),
        IS_INDEXED=False,
        **static,
    )
    return d_q, d_weights


def layers(weights: list[Tensor], residual_norm: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """First layer, last layer (at depth 1 the same one) and γ (None without ``residual_norm``)."""
    first, last = weights[0], weights[len(weights) - residual_norm - 1]
    gain = weights[-1].contiguous() if residual_norm else None
    return first.contiguous(), last.contiguous(), gain


def _static(call: ReadCall) -> dict[str, Any]:
    """The compile-time arguments that every kernel of the read takes, and its launch options."""
    depth = len(call.weights) - call.residual_norm
    return dict(
        H=call.q.shape[2],
        D=call.q.shape[3],
        E=call.weights[depth - 1].shape[2],
        **tile_sizes(call.q.shape[1], call.q.shape[3], call.q.dtype),
        DEPTH=depth,
        ACT=call.activation,
        RESIDUAL_NORM=call.residual_norm,
        IS_VARLEN=call.cu_seqlens is not None,
    )


def _example(
    dim: int, width: int, tokens: int, dtype: torch.dtype, *, depth: int = 2, ragged: bool = False,
    residual_norm: bool = False,
) -> Callable[[], object]:  # fmt: skip
    def launch() -> object:
        q = meta(*((1, tokens) if ragged else (2, tokens)), 4, dim, dtype=dtype)
        weights = [meta(2, 4, dim, width), meta(2, 4, width, dim)][-depth:]
        weights += [meta(2, 4, dim)] if residual_norm else []
        cu_seqlens = meta(3, dtype=torch.int64) if ragged else None
        call = ReadCall(q, weights, cu_seqlens, "gelu", residual_norm)
        return read_fwd(call), read_bwd(q, call)

    return launch


EXAMPLES = {
    "D64 E128 bf16 turn ragged": _example(64, 128, 112, torch.bfloat16, ragged=True),
    "D64 E256 bf16": _example(64, 256, 4096, torch.bfloat16),
    "D128 E512 bf16 norm": _example(128, 512, 4096, torch.bfloat16, residual_norm=True),
    "D128 E512 fp32 norm": _example(128, 512, 4096, torch.float32, residual_norm=True),
    "depth 1 D256 bf16": _example(256, 256, 4096, torch.bfloat16, depth=1),
    "depth 1 D256 fp32": _example(256, 256, 4096, torch.float32, depth=1),
}
