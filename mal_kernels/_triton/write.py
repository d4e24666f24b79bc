"""The write: factors of every token's gradient, then the state behind every tile.

Two regimes share the two stages :func:`gradient_factors` and :func:`advance_chunk`, which meet in
global memory. Token-parallel: each stage is a launch, over tiles and over slices of the hidden
width. Chunk-sequential: one program for a row and head takes the stages in turn, chunk after chunk.
A state is never on chip as a whole: what a program holds is a slice of ``BE`` hidden units of one
layer.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    anchor_index,
    chunk_gates,
    first_slot,
    last_row,
    load_part,
    load_tile,
    load_vector,
    row_chunks,
    row_span,
    row_tiles,
    state_index,
    store_part,
    store_tile,
    store_vector,
    tile_tokens,
)
from .tiles import (
    activate,
    activate_derivative,
    dot,
    layer_norm,
    layer_norm_bwd,
)


class Factors(NamedTuple):
    """``g_s = x_s ⊗ δ_s`` and what the write multiplies it by, per token ``[B, T, H, ...]``.

    ``h`` ``E`` (depth 2; else None) and ``d1`` ``E``, ``d2`` ``D``, ``dg`` ``D`` (γ's gradient) are
    in the tokens' dtype; the rest is float32: ``rate`` θ times the clip, ``square`` ``‖g_s‖²``,
    ``on_w`` and ``on_s`` the weights of ``g_s`` in the tile's ``W`` and ``S``; ``tile`` ``[slots,
    H, 4]`` β, f, ε.
    """

    h: Tensor | None
    d1: Tensor | None
    d2: Tensor
    dg: Tensor | None
    rate: Tensor
    square: Tensor | None
    on_w: Tensor
    on_s: Tensor
    tile: Tensor
    surprise: Tensor


@triton.jit
def network(b_x, p_x, i_th, m_t, p_w, M: tl.constexpr):
    """``act(x W1) W2`` ``[BT, BD]`` and ``‖h‖²`` ``[BT]`` of what the last layer is given."""
    b_o = tl.zeros([M.BT, M.BD], tl.float32)
    b_hh = tl.zeros([M.BT], tl.float32)
    for i_e in tl.range(0, M.E, M.BE, disable_licm=True):
        if M.DEPTH == 2:
            b_z = dot(b_x, load_part(p_w, 0, i_e, M.BD, M.BE, M.D, M.E))
            b_h = activate(b_z, M.ACT)
        else:
            b_h = load_tile(p_x, i_th, m_t, i_e, M.BE, M.D, M).to(tl.float32)
        b_w2 = load_part(p_w + M.LAST, i_e, 0, M.BE, M.BD, M.E, M.D)
        b_o = dot(b_h.to(b_x.dtype), b_w2, b_o)
        b_hh += tl.sum(b_h * b_h, 1)
    return b_o, b_hh


@triton.jit
def inner_error(b_o, b_k, b_v, p_w, m_d, M: tl.constexpr):
    """``M(k) − v``, ``δ`` of the last layer, γ's gradient, from ``b_o`` ``[BT, BD]`` = ``h W2``."""
    if M.RESIDUAL_NORM:
        b_normed, b_scale = layer_norm(b_o, m_d, M.D)
        b_gain = 1 + tl.load(p_w + M.GAIN + tl.arange(0, M.BD), mask=m_d, other=0.0)[None, :]
        b_error = b_k.to(tl.float32) + b_gain * b_normed - b_v.to(tl.float32)
        b_d2 = layer_norm_bwd(2 * b_error * b_gain, b_normed, b_scale, m_d, M.D)
        b_dg = 2 * b_error * b_normed
    else:
        b_error = b_o - b_v.to(tl.float32)
        b_d2 = 2 * b_error
        b_dg = b_error
    return b_error, b_d2, b_dg


@triton.jit
def gradient_factors(
    t, f, rows, p_w, begin, length, start, i_n, i_h, i_c, i_j, slot, C, NC,
    M: tl.constexpr,
):  # fmt: skip
    """One tile's factors at the anchor ``p_w``; with the gates, its weights in the state behind it.

    ``z = k W1, h = act(z), δ2 = 2(h W2 − v)`` (through LayerNorm), ``δ1 = (δ2 W2ᵀ) ⊙ act'(z)``.
    """
    i_t, m_t = tile_tokens(i_c, i_j, length, start, C, M)
    i_th = (begin + i_t) * M.H + i_h
    o_d = tl.arange(0, M.BD)
    m_d = o_d < M.D
    b_k = load_tile(t.k, i_th, m_t, 0, M.BD, M.D, M)  # [BT, BD]
    b_o, b_hh = network(b_k, t.k, i_th, m_t, p_w, M)
    b_v = load_tile(t.v, i_th, m_t, 0, M.BD, M.D, M)
    b_error, b_d2, b_dg = inner_error(b_o, b_k, b_v, p_w, m_d, M)
    store_vector(f.surprise, tl.sum(b_error * b_error, 1), i_th, m_t, M)
    store_tile(f.d2, b_d2, i_th, m_t, 0, M.BD, M.D, M)
    b_square = tl.sum(b_d2 * b_d2, 1) * b_hh
    if M.RESIDUAL_NORM:
        store_tile(f.dg, b_dg, i_th, m_t, 0, M.BD, M.D, M)
        b_square += tl.sum(b_dg * b_dg, 1)
    if M.DEPTH == 2:
        b_kk = tl.sum(b_k.to(tl.float32) * b_k.to(tl.float32), 1)
        for i_e in tl.range(0, M.E, M.BE, disable_licm=True):
            b_z = dot(b_k, load_part(p_w, 0, i_e, M.BD, M.BE, M.D, M.E))  # [BT, BE]
            b_w2 = load_part(p_w + M.LAST, i_e, 0, M.BE, M.BD, M.E, M.D)
            b_d1 = dot(b_d2.to(b_k.dtype), tl.trans(b_w2)) * activate_derivative(b_z, M.ACT)
            store_tile(f.h, activate(b_z, M.ACT), i_th, m_t, i_e, M.BE, M.E, M)
            store_tile(f.d1, b_d1, i_th, m_t, i_e, M.BE, M.E, M)
            b_square += tl.sum(b_d1 * b_d1, 1) * b_kk
    b_rate = load_vector(t.lr, i_th, m_t, M).to(tl.float32)
    if M.CLIPS:
        b_rate *= M.MAX_NORM * tl.rsqrt(tl.maximum(b_square, M.MAX_NORM * M.MAX_NORM))
        store_vector(f.square, b_square, i_th, m_t, M)
    store_vector(f.rate, b_rate, i_th, m_t, M)
    if M.TOKEN_STEPS:
        b_w, b_e, beta, on_trace, e0 = last_row(t, i_th, m_t, M)
        store_vector(f.on_w, b_w * b_rate, i_th, m_t, M)
        store_vector(f.on_s, b_e * b_rate, i_th, m_t, M)
    else:
        eta, a = chunk_gates(t, rows, i_n, i_c, i_h, NC, M)
        beta = tl.where(i_j == 0, a, 1.0)
        on_trace = tl.where(i_j == 0, eta, 0.0)
        e0 = tl.where(i_j == 0, eta, 1.0)
        store_vector(f.on_w, b_rate, i_th, m_t, M)
    p_tile = f.tile + ((slot + i_c * tl.cdiv(C, M.BT) + i_j) * M.H + i_h) * 4
    tl.store(p_tile, beta)
    tl.store(p_tile + 1, on_trace)
    tl.store(p_tile + 2, e0)


@triton.jit
def summed_gradient(b_c, b_x, b_y):
    """``Σ_s c_s x_s ⊗ y_s`` of a tile ``[BT, X]``, ``[BT, Y]``.

    ``c`` goes to ``y``, so that ``x`` need not go through registers; float32, which goes through
    them anyway, to the narrower of the two.
    """
    if b_x.dtype == tl.float32 and b_x.shape[1] < b_y.shape[1]:
        b_sum = dot(tl.trans(b_c[:, None] * b_x), b_y)
    else:
        b_sum = dot(tl.trans(b_x), b_c[:, None] * b_y.to(tl.float32))
    return b_sum


@triton.jit
def advance_layer(
    s, f, p_x, p_y, i_x, i_y, BX: tl.constexpr, BY: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, OFFSET: tl.constexpr,
    begin, length, start, i_n, i_h, i_c, slot, C, N, M: tl.constexpr,
):  # fmt: skip
    """The tiles of chunk ``i_c`` on ``[BX, BY]`` of one layer ``[X, Y]``.

    As::

    W ← β W + f S − Σ on_w x ⊗ δ + (1 − β) W_init        S ← ε S − Σ on_s x ⊗ δ
    """
    per_chunk = tl.cdiv(C, M.BT)
    n_tiles = row_tiles(length, start, C, M)
    first = i_c * per_chunk
    end = tl.minimum(first + per_chunk, n_tiles)
    if M.KEEPS_ANCHOR:
        if i_c == row_chunks(length, start, C) - 1:
            anchor = anchor_index(i_c, n_tiles, start, i_n, slot, C, N, M)
            b_w = load_part(s.weights + (anchor * M.H + i_h) * M.P + OFFSET, i_x, i_y, BX, BY, X, Y)
            kept = ((3 * N + i_n) * M.H + i_h) * M.P + OFFSET
            store_part(s.weights + kept, b_w, i_x, i_y, BX, BY, X, Y)
    before = (state_index(first, n_tiles, i_n, slot, N, M) * M.H + i_h) * M.P + OFFSET
    b_w = load_part(s.weights + before, i_x, i_y, BX, BY, X, Y)
    b_s = load_part(s.trace + before, i_x, i_y, BX, BY, X, Y)
    for n in tl.range(first, end, disable_licm=True):
        i_t, m_t = tile_tokens(i_c, n - first, length, start, C, M)
        i_th = (begin + i_t) * M.H + i_h
        b_x = load_tile(p_x, i_th, m_t, i_x, BX, X, M)
        b_y = load_tile(p_y, i_th, m_t, i_y, BY, Y, M)
        p_tile = f.tile + ((slot + n) * M.H + i_h) * 4
        beta, on_trace, e0 = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
        b_on_w = load_vector(f.on_w, i_th, m_t, M)
        b_g = summed_gradient(b_on_w, b_x, b_y)
        b_w = beta * b_w - b_g
        if M.HAS_MOMENTUM:
            b_w += on_trace * b_s
        if M.HAS_INIT:
            p_init = s.init + (i_n * M.H + i_h) * M.P + OFFSET
            b_w += (1 - beta) * load_part(p_init, i_x, i_y, BX, BY, X, Y)
        if M.TOKEN_STEPS:
            # without momentum only the last S of all is ever seen
            if M.HAS_MOMENTUM or n == n_tiles - 1:
                b_on_s = load_vector(f.on_s, i_th, m_t, M)
                b_s = e0 * b_s - summed_gradient(b_on_s, b_x, b_y)
        else:
            b_s = e0 * b_s - b_g
        if M.SAVES_STATES:
            if n + 1 < n_tiles:
                after = ((4 * N + slot + n + 1) * M.H + i_h) * M.P + OFFSET
                store_part(s.weights + after, b_w, i_x, i_y, BX, BY, X, Y)
                store_part(s.trace + after, b_s, i_x, i_y, BX, BY, X, Y)
    if (not M.SAVES_STATES) or end == n_tiles:
        after = ((N + i_n) * M.H + i_h) * M.P + OFFSET
        store_part(s.weights + after, b_w, i_x, i_y, BX, BY, X, Y)
        store_part(s.trace + after, b_s, i_x, i_y, BX, BY, X, Y)


@triton.jit
def advance_gain(
    s, f, begin, length, start, i_n, i_h, i_c, slot, C, N, M: tl.constexpr
):  # fmt: skip
    """:func:`advance_layer` of γ ``[D]``, whose gradient is a plain vector."""
    per_chunk = tl.cdiv(C, M.BT)
    n_tiles = row_tiles(length, start, C, M)
    first = i_c * per_chunk
    end = tl.minimum(first + per_chunk, n_tiles)
    o_d = tl.arange(0, M.BD)
    m_d = o_d < M.D
    if M.KEEPS_ANCHOR:
        if i_c == row_chunks(length, start, C) - 1:
            anchor = anchor_index(i_c, n_tiles, start, i_n, slot, C, N, M)
            o_anchor = (anchor * M.H + i_h) * M.P + M.GAIN + o_d
            o_kept = ((3 * N + i_n) * M.H + i_h) * M.P + M.GAIN + o_d
            b_w = tl.load(s.weights + o_anchor, mask=m_d, other=0.0)
            tl.store(s.weights + o_kept, b_w, mask=m_d)
    o_before = (state_index(first, n_tiles, i_n, slot, N, M) * M.H + i_h) * M.P + M.GAIN + o_d
    b_w = tl.load(s.weights + o_before, mask=m_d, other=0.0)
    b_s = tl.load(s.trace + o_before, mask=m_d, other=0.0)
    for n in tl.range(first, end, disable_licm=True):
        i_t, m_t = tile_tokens(i_c, n - first, length, start, C, M)
        i_th = (begin + i_t) * M.H + i_h
        b_y = load_tile(f.dg, i_th, m_t, 0, M.BD, M.D, M).to(tl.float32)
        p_tile = f.tile + ((slot + n) * M.H + i_h) * 4
        beta, on_trace, e0 = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
        b_on_w = load_vector(f.on_w, i_th, m_t, M)
        b_on_s = b_on_w
        if M.TOKEN_STEPS:
            b_on_s = load_vector(f.on_s, i_th, m_t, M)
        b_w = beta * b_w - tl.sum(b_on_w[:, None] * b_y, 0)
        if M.HAS_MOMENTUM:
            b_w += on_trace * b_s
        if M.HAS_INIT:
            o_init = (i_n * M.H + i_h) * M.P + M.GAIN + o_d
            b_w += (1 - beta) * tl.load(s.init + o_init, mask=m_d, other=0.0)
        b_s = e0 * b_s - tl.sum(b_on_s[:, None] * b_y, 0)
        if M.SAVES_STATES:
            if n + 1 < n_tiles:
                o_after = ((4 * N + slot + n + 1) * M.H + i_h) * M.P + M.GAIN + o_d
                tl.store(s.weights + o_after, b_w, mask=m_d)
                tl.store(s.trace + o_after, b_s, mask=m_d)
    if (not M.SAVES_STATES) or end == n_tiles:
        o_after = ((N + i_n) * M.H + i_h) * M.P + M.GAIN + o_d
        tl.store(s.weights + o_after, b_w, mask=m_d)
        tl.store(s.trace + o_after, b_s, mask=m_d)


@triton.jit
def advance_chunk(
    t, s, f, begin, length, start, i_n, i_h, i_c, i_e, slot, C, N, M: tl.constexpr
):  # fmt: skip
    """The tiles of chunk ``i_c`` on slice ``i_e`` of every layer."""
    p_x = t.k
    if M.DEPTH == 2:
        p_x = f.h
        advance_layer(
            s, f, t.k, f.d1, 0, i_e, M.BD, M.BE, M.D, M.E, 0,
            begin, length, start, i_n, i_h, i_c, slot, C, N, M,
        )  # fmt: skip
    advance_layer(
        s, f, p_x, f.d2, i_e, 0, M.BE, M.BD, M.E, M.D, M.LAST,
        begin, length, start, i_n, i_h, i_c, slot, C, N, M,
    )  # fmt: skip
    if M.RESIDUAL_NORM:
        if i_e == 0:
            advance_gain(s, f, begin, length, start, i_n, i_h, i_c, slot, C, N, M)


@triton.jit(do_not_specialize=["T", "C", "N", "NC", "i_c"])
def factors_fwd_kernel(t, s, f, rows, T, C, N, NC, i_c, M: tl.constexpr):
    """:func:`gradient_factors` of chunk ``i_c``. Grid (rows · H, tiles of a chunk)."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    i_j = tl.program_id(1)
    begin, length, start = row_span(rows, i_n, T, M)
    n_tiles, slot = row_tiles(length, start, C, M), first_slot(begin, i_n, C, M)
    if i_c * tl.cdiv(C, M.BT) + i_j < n_tiles:
        anchor = anchor_index(i_c, n_tiles, start, i_n, slot, C, N, M)
        p_w = s.weights + (anchor * M.H + i_h) * M.P
        gradient_factors(
            t, f, rows, p_w, begin, length, start, i_n, i_h, i_c, i_j, slot, C, NC, M
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "C", "N", "i_c"])
def state_fwd_kernel(t, s, f, rows, T, C, N, i_c, M: tl.constexpr):
    """:func:`advance_chunk`. Grid (rows · H, slices of the hidden width)."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    begin, length, start = row_span(rows, i_n, T, M)
    if i_c < row_chunks(length, start, C):
        i_e, slot = tl.program_id(1) * M.BE, first_slot(begin, i_n, C, M)
        advance_chunk(t, s, f, begin, length, start, i_n, i_h, i_c, i_e, slot, C, N, M)


@triton.jit(do_not_specialize=["T", "C", "N", "NC"])
def write_fwd_kernel(t, s, f, rows, T, C, N, NC, M: tl.constexpr):
    """Both stages, chunk after chunk, for one row and head. Grid (rows · H,)."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    begin, length, start = row_span(rows, i_n, T, M)
    n_tiles, slot = row_tiles(length, start, C, M), first_slot(begin, i_n, C, M)
    per_chunk = tl.cdiv(C, M.BT)
    for i_c in tl.range(0, row_chunks(length, start, C), disable_licm=True):
        anchor = anchor_index(i_c, n_tiles, start, i_n, slot, C, N, M)
        p_w = s.weights + (anchor * M.H + i_h) * M.P
        for i_j in tl.range(0, tl.minimum(per_chunk, n_tiles - i_c * per_chunk), disable_licm=True):
            gradient_factors(
                t, f, rows, p_w, begin, length, start, i_n, i_h, i_c, i_j, slot, C, NC, M
            )  # fmt: skip
        tl.debug_barrier()  # what one thread stored, another loads
        for i_e in tl.range(0, M.E, M.BE, disable_licm=True):
            advance_chunk(t, s, f, begin, length, start, i_n, i_h, i_c, i_e, slot, C, N, M)
        tl.debug_barrier()
