"""Backward of :mod:`.causal_read`, in stages that meet in memory.

A program owns one tile of one row and head, recomputes its read, and stores per token what the
backward walk over the states needs: ``hq`` and ``dzq``, ``do`` (before LayerNorm), ``dγ``, and β
and f.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .causal_read import hidden_at_every_token, inner_output, mixed_gain
from .chunks import (
    first_slot,
    load_part,
    load_tile,
    load_vector,
    recursions,
    row_span,
    row_tiles,
    state_index,
    store_tile,
    store_vector,
    tile_tokens,
    token_gates,
)
from .tiles import (
    activate,
    activate_derivative,
    dot,
    layer_norm,
    layer_norm_bwd,
)
from .write import network


@triton.jit
def products(
    b_x, p_w, p_s, p_init, i_r, i_c, BR: tl.constexpr, BC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """``x W``, ``x S`` and ``x W_init`` of one slice; what a call has not is zero."""
    b_w = load_part(p_w, i_r, i_c, BR, BC, R, C)
    b_s = load_part(p_s, i_r, i_c, BR, BC, R, C)
    b_init = load_part(p_init, i_r, i_c, BR, BC, R, C)
    if TRANSPOSED:
        b_w, b_s, b_init = tl.trans(b_w), tl.trans(b_s), tl.trans(b_init)
    b_xw = dot(b_x, b_w)
    b_xs, b_xi = tl.zeros_like(b_xw), tl.zeros_like(b_xw)
    if M.HAS_MOMENTUM:
        b_xs = dot(b_x, b_s)
    if M.HAS_INIT:
        b_xi = dot(b_x, b_init)
    return b_xw, b_xs, b_xi


@triton.jit
def mix(b_beta, b_f, b_xw, b_xs, b_xi):
    return b_beta[:, None] * b_xw + b_f[:, None] * b_xs + (1 - b_beta)[:, None] * b_xi


@triton.jit
def spread(b_dq, b_dz, b_beta, b_f, p_w, p_s, p_init, i_e, M: tl.constexpr):
    """``+ (β ⊙ dz) W1ᵀ + (f ⊙ dz) S1ᵀ + ((1 − β) ⊙ dz) W1_initᵀ`` of one slice."""
    b_w = load_part(p_w, 0, i_e, M.BD, M.BE, M.D, M.E)
    b_dq = dot((b_beta[:, None] * b_dz).to(b_dz.dtype), tl.trans(b_w), b_dq)
    if M.HAS_MOMENTUM:
        b_s = load_part(p_s, 0, i_e, M.BD, M.BE, M.D, M.E)
        b_dq = dot((b_f[:, None] * b_dz).to(b_dz.dtype), tl.trans(b_s), b_dq)
    if M.HAS_INIT:
        b_init = load_part(p_init, 0, i_e, M.BD, M.BE, M.D, M.E)
        b_dq = dot(((1 - b_beta)[:, None] * b_dz).to(b_dz.dtype), tl.trans(b_init), b_dq)
    return b_dq


@triton.jit
def norm_bwd(b_dy, b_o, b_gain, m_d, M: tl.constexpr):
    """Gradients ``[BT, BD]`` of the output before LayerNorm and of γ at every token."""
    b_normed, b_scale = layer_norm(b_o, m_d, M.D)
    return layer_norm_bwd(b_dy * b_gain, b_normed, b_scale, m_d, M.D), b_dy * b_normed


@triton.jit
def gain_bwd(b_dgamma, b_dg, b_c, p_w, p_s, p_init, o_d, m_d, M: tl.constexpr):
    """From γ's gradient at every token to those of ``w ⊙ rate``, β, f and the factor ``dg``."""
    b_dgamma_x = b_dgamma.to(b_dg.dtype)
    b_dc = -dot(b_dgamma_x, tl.trans(b_dg))
    b_ddg = -dot(tl.trans(b_c).to(b_dg.dtype), b_dgamma_x)
    b_row = tl.load(p_w + o_d, mask=m_d, other=0.0)
    if M.HAS_INIT:
        b_row -= tl.load(p_init + o_d, mask=m_d, other=0.0)
    b_trace = tl.load(p_s + o_d, mask=m_d, other=0.0)
    return (
        b_dc,
        tl.sum(b_dgamma * b_row[None, :], 1),
        tl.sum(b_dgamma * b_trace[None, :], 1),
        b_ddg,
    )


@triton.jit
def output_bwd(t, f, g, p_dy, i_th, m_t, p_w, p_s, p_init, M: tl.constexpr):
    """LayerNorm and γ of one tile, backwards: ``do``, and the gradients of ``dg``, w, β and f."""
    o_d = tl.arange(0, M.BD)
    m_d = o_d < M.D
    b_q = load_tile(t.q, i_th, m_t, 0, M.BD, M.D, M)  # [BT, BD]
    b_eta, b_a = token_gates(t, i_th, m_t, M)
    b_w, _, b_beta, b_f, _ = recursions(b_eta, b_a, m_t, 0, M)
    b_c = b_w * load_vector(f.rate, i_th, m_t, M)[None, :]  # [BT, BT]
    b_o = inner_output(t, f, b_q, b_c, b_beta, b_f, i_th, m_t, p_w, p_s, p_init, M)
    b_dg = load_tile(f.dg, i_th, m_t, 0, M.BD, M.D, M)
    b_gain = mixed_gain(
        b_beta, b_f, b_c, b_dg, p_w + M.GAIN, p_s + M.GAIN, p_init + M.GAIN, o_d, m_d, M
    )  # fmt: skip
    b_dy = load_tile(p_dy, i_th, m_t, 0, M.BD, M.D, M).to(tl.float32)
    b_do, b_dgamma = norm_bwd(b_dy, b_o, b_gain, m_d, M)
    store_tile(g.oq, b_do, i_th, m_t, 0, M.BD, M.D, M)
    store_tile(g.gq, b_dgamma, i_th, m_t, 0, M.BD, M.D, M)
    b_dc, b_dbeta, b_df, b_ddg = gain_bwd(
        b_dgamma, b_dg, b_c, p_w + M.GAIN, p_s + M.GAIN, p_init + M.GAIN, o_d, m_d, M
    )  # fmt: skip
    store_tile(g.dg, b_ddg, i_th, m_t, 0, M.BD, M.D, M)
    store_tile(g.w, b_dc, i_th, m_t, 0, M.BT, M.BT, M)
    store_vector(g.dbeta, b_dbeta, i_th, m_t, M)
    store_vector(g.df, b_df, i_th, m_t, M)


@triton.jit
def scores_bwd(t, f, g, i_th, m_t, p_w, p_s, p_init, M: tl.constexpr):
    """``hq hᵀ`` of one tile, backwards; what the next two need of the tile."""
    b_q = load_tile(t.q, i_th, m_t, 0, M.BD, M.D, M)  # [BT, BD]
    b_k = load_tile(t.k, i_th, m_t, 0, M.BD, M.D, M)
    b_eta, b_a = token_gates(t, i_th, m_t, M)
    b_w, _, b_beta, b_f, _ = recursions(b_eta, b_a, m_t, 0, M)
    store_tile(g.decays, b_w, i_th, m_t, 0, M.BT, M.BT, M)
    store_vector(g.beta, b_beta, i_th, m_t, M)
    store_vector(g.f, b_f, i_th, m_t, M)
    b_c = b_w * load_vector(f.rate, i_th, m_t, M)[None, :]  # [BT, BT]
    b_a = (b_c * dot(b_q, tl.trans(b_k))).to(b_q.dtype)
    b_hh = tl.zeros([M.BT, M.BT], tl.float32)  # hq hᵀ
    for i_e in range(0, M.E, M.BE):
        b_hq, b_h = hidden_at_every_token(
            t, f, b_q, b_a, b_beta, b_f, i_th, m_t, i_e, p_w, p_s, p_init, M
        )  # fmt: skip
        b_hh = dot(b_hq, tl.trans(b_h), b_hh)
    b_d2 = load_tile(f.d2, i_th, m_t, 0, M.BD, M.D, M)
    b_do = load_tile(g.oq, i_th, m_t, 0, M.BD, M.D, M)
    b_dc = -dot(b_do, tl.trans(b_d2)) * b_hh
    if M.RESIDUAL_NORM:
        b_dc += load_tile(g.w, i_th, m_t, 0, M.BT, M.BT, M)
    else:
        store_vector(g.dbeta, tl.zeros([M.BT], tl.float32), i_th, m_t, M)
        store_vector(g.df, tl.zeros([M.BT], tl.float32), i_th, m_t, M)
    store_tile(g.w, b_dc, i_th, m_t, 0, M.BT, M.BT, M)
    tl.debug_barrier()  # what one thread stored, another loads
    # read again: held over the loop it would not fit into registers
    b_c = load_tile(g.decays, i_th, m_t, 0, M.BT, M.BT, M)
    b_c *= load_vector(f.rate, i_th, m_t, M)[None, :]
    b_dd2 = -dot(tl.trans((b_c * b_hh).to(b_q.dtype)), b_do)
    store_tile(g.d2, b_dd2, i_th, m_t, 0, M.BD, M.D, M)


@triton.jit
def tile_scores(t, f, g, b_q, b_do, i_th, m_t, M: tl.constexpr):
    """``w ⊙ rate ⊙ (q kᵀ)`` and the gradient of ``hq hᵀ``, ``[BT, BT]`` as operands."""
    b_k = load_tile(t.k, i_th, m_t, 0, M.BD, M.D, M)  # [BT, BD]
    b_d2 = load_tile(f.d2, i_th, m_t, 0, M.BD, M.D, M)
    b_rate = load_vector(f.rate, i_th, m_t, M)
    b_c = load_tile(g.decays, i_th, m_t, 0, M.BT, M.BT, M) * b_rate[None, :]
    b_a = (b_c * dot(b_q, tl.trans(b_k))).to(b_q.dtype)
    return b_a, (-b_c * dot(b_do, tl.trans(b_d2))).to(b_q.dtype)


@triton.jit
def queries_bwd(t, f, g, p_dy, p_dq, i_th, m_t, p_w, p_s, p_init, M: tl.constexpr):
    """``hq`` and ``dzq`` of one tile (at depth 1 ``dq``), and the gradients of β and f."""
    b_q = load_tile(t.q, i_th, m_t, 0, M.BD, M.D, M)  # [BT, BD]
    b_do = load_tile(g.oq, i_th, m_t, 0, M.BD, M.D, M)
    b_beta, b_f = load_vector(g.beta, i_th, m_t, M), load_vector(g.f, i_th, m_t, M)
    b_dbeta, b_df = load_vector(g.dbeta, i_th, m_t, M), load_vector(g.df, i_th, m_t, M)
    b_a, b_dhh = tile_scores(t, f, g, b_q, b_do, i_th, m_t, M)
    for i_e in range(0, M.E, M.BE):
        b_ow, b_os, b_oi = products(
            b_do, p_w + M.LAST, p_s + M.LAST, p_init + M.LAST,
            i_e, 0, M.BE, M.BD, M.E, M.D, True, M,
        )  # fmt: skip
        b_dz = mix(b_beta, b_f, b_ow, b_os, b_oi)  # [BT, BE]
        if M.DEPTH == 2:
            b_zw, b_zs, b_zi = products(
                b_q, p_w, p_s, p_init, 0, i_e, M.BD, M.BE, M.D, M.E, False, M
            )  # fmt: skip
            b_z = mix(b_beta, b_f, b_zw, b_zs, b_zi)
            b_z -= dot(b_a, load_tile(f.d1, i_th, m_t, i_e, M.BE, M.E, M))
            b_hq = activate(b_z, M.ACT)
            b_dz += dot(b_dhh, load_tile(f.h, i_th, m_t, i_e, M.BE, M.E, M))
            b_dz *= activate_derivative(b_z, M.ACT)
            store_tile(g.hq, b_hq, i_th, m_t, i_e, M.BE, M.E, M)
            store_tile(g.zq, b_dz, i_th, m_t, i_e, M.BE, M.E, M)
            b_dbeta += tl.sum(b_dz * (b_zw - b_zi), 1)
            b_df += tl.sum(b_dz * b_zs, 1)
        else:
            b_hq = load_tile(t.q, i_th, m_t, i_e, M.BE, M.D, M).to(tl.float32)
            b_dz += dot(b_dhh, load_tile(t.k, i_th, m_t, i_e, M.BE, M.D, M))
            if M.RESIDUAL_NORM:
                b_dz += load_tile(p_dy, i_th, m_t, i_e, M.BE, M.D, M).to(tl.float32)
            store_tile(p_dq, b_dz, i_th, m_t, i_e, M.BE, M.D, M)
        b_dbeta += tl.sum(b_hq * (b_ow - b_oi), 1)
        b_df += tl.sum(b_hq * b_os, 1)
    store_vector(g.dbeta, b_dbeta, i_th, m_t, M)
    store_vector(g.df, b_df, i_th, m_t, M)


@triton.jit
def keys_bwd(t, f, g, p_dy, p_dq, i_th, m_t, p_w, p_s, p_init, M: tl.constexpr):
    """From :func:`queries_bwd` to factors, keys, ``w`` and rate, and at depth 2 the queries."""
    b_q = load_tile(t.q, i_th, m_t, 0, M.BD, M.D, M)  # [BT, BD]
    b_do = load_tile(g.oq, i_th, m_t, 0, M.BD, M.D, M)
    b_a, b_dhh = tile_scores(t, f, g, b_q, b_do, i_th, m_t, M)
    b_w = load_tile(g.decays, i_th, m_t, 0, M.BT, M.BT, M)  # [BT, BT]
    b_dc = load_tile(g.w, i_th, m_t, 0, M.BT, M.BT, M)
    b_rate = load_vector(f.rate, i_th, m_t, M)
    if M.DEPTH == 2:
        b_beta, b_f = load_vector(g.beta, i_th, m_t, M), load_vector(g.f, i_th, m_t, M)
        b_r = tl.zeros([M.BT, M.BT], tl.float32)  # dzq δ1ᵀ
        b_dq = tl.zeros([M.BT, M.BD], tl.float32)
        for i_e in range(0, M.E, M.BE):
            b_dz = load_tile(g.zq, i_th, m_t, i_e, M.BE, M.E, M)  # [BT, BE]
            b_hq = load_tile(g.hq, i_th, m_t, i_e, M.BE, M.E, M)
            b_d1 = load_tile(f.d1, i_th, m_t, i_e, M.BE, M.E, M)
            store_tile(g.h, dot(tl.trans(b_dhh), b_hq), i_th, m_t, i_e, M.BE, M.E, M)
            store_tile(g.d1, -dot(tl.trans(b_a), b_dz), i_th, m_t, i_e, M.BE, M.E, M)
            b_r = dot(b_dz, tl.trans(b_d1), b_r)
            b_dq = spread(b_dq, b_dz, b_beta, b_f, p_w, p_s, p_init, i_e, M)
        b_k = load_tile(t.k, i_th, m_t, 0, M.BD, M.D, M)
        b_dc -= b_r * dot(b_q, tl.trans(b_k))
        b_da = (-b_w * b_rate[None, :] * b_r).to(b_q.dtype)
        b_dq = dot(b_da, b_k, b_dq)
        if M.RESIDUAL_NORM:
            b_dq += load_tile(p_dy, i_th, m_t, 0, M.BD, M.D, M).to(tl.float32)
        store_tile(p_dq, b_dq, i_th, m_t, 0, M.BD, M.D, M)
        store_tile(g.k, dot(tl.trans(b_da), b_q), i_th, m_t, 0, M.BD, M.D, M)
    else:
        store_tile(g.k, dot(tl.trans(b_dhh), b_q), i_th, m_t, 0, M.BD, M.D, M)
    store_vector(g.rate, tl.sum(b_w * b_dc, 0), i_th, m_t, M)
    store_tile(g.w, b_dc * b_rate[None, :], i_th, m_t, 0, M.BT, M.BT, M)


@triton.jit
def chunk_read_bwd(t, g, p_dy, p_dq, i_th, m_t, p_w, M: tl.constexpr):
    """Backward of one tile that reads the weights before its chunk."""
    o_d = tl.arange(0, M.BD)
    m_d = o_d < M.D
    b_q = load_tile(t.q, i_th, m_t, 0, M.BD, M.D, M)  # [BT, BD]
    if M.RESIDUAL_NORM:
        b_o, _ = network(b_q, t.q, i_th, m_t, p_w, M)
        b_gain = 1 + tl.load(p_w + M.GAIN + o_d, mask=m_d, other=0.0)[None, :]
        b_dq = load_tile(p_dy, i_th, m_t, 0, M.BD, M.D, M).to(tl.float32)
        b_dx, b_dgamma = norm_bwd(b_dq, b_o, b_gain, m_d, M)
        b_do = b_dx.to(b_q.dtype)
        store_tile(g.oq, b_do, i_th, m_t, 0, M.BD, M.D, M)
        store_tile(g.gq, b_dgamma, i_th, m_t, 0, M.BD, M.D, M)
    else:
        b_do = load_tile(p_dy, i_th, m_t, 0, M.BD, M.D, M)
        b_dq = tl.zeros([M.BT, M.BD], tl.float32)
    for i_e in tl.range(0, M.E, M.BE, disable_licm=True):
        b_dz = dot(
            b_do, tl.trans(load_part(p_w + M.LAST, i_e, 0, M.BE, M.BD, M.E, M.D))
        )  # [BT, BE]
        if M.DEPTH == 2:
            b_w1 = load_part(p_w, 0, i_e, M.BD, M.BE, M.D, M.E)
            b_z = dot(b_q, b_w1)
            b_dzx = (b_dz * activate_derivative(b_z, M.ACT)).to(b_q.dtype)
            store_tile(g.hq, activate(b_z, M.ACT), i_th, m_t, i_e, M.BE, M.E, M)
            store_tile(g.zq, b_dzx, i_th, m_t, i_e, M.BE, M.E, M)
            b_dq = dot(b_dzx, tl.trans(b_w1), b_dq)
        else:
            if M.RESIDUAL_NORM:
                b_dz += load_tile(p_dy, i_th, m_t, i_e, M.BE, M.D, M).to(tl.float32)
            store_tile(p_dq, b_dz, i_th, m_t, i_e, M.BE, M.D, M)
    if M.DEPTH == 2:
        store_tile(p_dq, b_dq, i_th, m_t, 0, M.BD, M.D, M)


@triton.jit
def tile_states(s, n, n_tiles, i_n, i_h, slot, N, M: tl.constexpr):
    """Weights and momentum before a tile, and decay's target (the weights where there is none)."""
    before = (state_index(n, n_tiles, i_n, slot, N, M) * M.H + i_h) * M.P
    p_w, p_s = s.weights + before, s.trace + before
    p_init = p_w
    if M.HAS_INIT:
        p_init = s.init + (i_n * M.H + i_h) * M.P
    return p_w, p_s, p_init


@triton.jit(do_not_specialize=["T", "C", "N"])
def read_output_bwd_kernel(t, s, f, g, rows, p_dy, T, C, N, M: tl.constexpr):
    """:func:`output_bwd`, where tokens step through LayerNorm. Grid as forward."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    n = tl.program_id(1)
    begin, length, start = row_span(rows, i_n, T, M)
    n_tiles, slot = row_tiles(length, start, C, M), first_slot(begin, i_n, C, M)
    if n < n_tiles:
        per_chunk = tl.cdiv(C, M.BT)
        i_t, m_t = tile_tokens(n // per_chunk, n % per_chunk, length, start, C, M)
        p_w, p_s, p_init = tile_states(s, n, n_tiles, i_n, i_h, slot, N, M)
        output_bwd(t, f, g, p_dy, (begin + i_t) * M.H + i_h, m_t, p_w, p_s, p_init, M)


@triton.jit(do_not_specialize=["T", "C", "N"])
def read_scores_bwd_kernel(t, s, f, g, rows, T, C, N, M: tl.constexpr):
    """:func:`scores_bwd`, where tokens step. Grid as forward."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    n = tl.program_id(1)
    begin, length, start = row_span(rows, i_n, T, M)
    n_tiles, slot = row_tiles(length, start, C, M), first_slot(begin, i_n, C, M)
    if n < n_tiles:
        per_chunk = tl.cdiv(C, M.BT)
        i_t, m_t = tile_tokens(n // per_chunk, n % per_chunk, length, start, C, M)
        p_w, p_s, p_init = tile_states(s, n, n_tiles, i_n, i_h, slot, N, M)
        scores_bwd(t, f, g, (begin + i_t) * M.H + i_h, m_t, p_w, p_s, p_init, M)


@triton.jit(do_not_specialize=["T", "C", "N"])
def read_queries_bwd_kernel(t, s, f, g, rows, p_dy, p_dq, T, C, N, M: tl.constexpr):
    """:func:`queries_bwd`, or where chunks step :func:`chunk_read_bwd`. Grid as forward."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    n = tl.program_id(1)
    begin, length, start = row_span(rows, i_n, T, M)
    n_tiles, slot = row_tiles(length, start, C, M), first_slot(begin, i_n, C, M)
    if n < n_tiles:
        per_chunk = tl.cdiv(C, M.BT)
        i_c = n // per_chunk
        i_t, m_t = tile_tokens(i_c, n % per_chunk, length, start, C, M)
        i_th = (begin + i_t) * M.H + i_h
        first = n if M.TOKEN_STEPS else i_c * per_chunk
        p_w, p_s, p_init = tile_states(s, first, n_tiles, i_n, i_h, slot, N, M)
        if M.TOKEN_STEPS:
            queries_bwd(t, f, g, p_dy, p_dq, i_th, m_t, p_w, p_s, p_init, M)
        else:
            chunk_read_bwd(t, g, p_dy, p_dq, i_th, m_t, p_w, M)


@triton.jit(do_not_specialize=["T", "C", "N"])
def read_keys_bwd_kernel(t, s, f, g, rows, p_dy, p_dq, T, C, N, M: tl.constexpr):
    """:func:`keys_bwd`, where tokens step. Grid as forward."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    n = tl.program_id(1)
    begin, length, start = row_span(rows, i_n, T, M)
    n_tiles, slot = row_tiles(length, start, C, M), first_slot(begin, i_n, C, M)
    if n < n_tiles:
        per_chunk = tl.cdiv(C, M.BT)
        i_t, m_t = tile_tokens(n // per_chunk, n % per_chunk, length, start, C, M)
        p_w, p_s, p_init = tile_states(s, n, n_tiles, i_n, i_h, slot, N, M)
        keys_bwd(t, f, g, p_dy, p_dq, (begin + i_t) * M.H + i_h, m_t, p_w, p_s, p_init, M)
