"""The read of every token at its own weights: the state before its tile and the tile's factors.

With ``w`` and ``β, f`` of the tile (:func:`.chunks.recursions`), a program owns one tile of one row
and head and sums over slices of the hidden width::

    zq = β ⊙ (Q W1) + f ⊙ (Q S1) + (1 − β) ⊙ (Q W1_init) − [w ⊙ rate ⊙ (Q Kᵀ)] δ1
    y  = the same with hq = act(zq), W2 and [w ⊙ rate ⊙ (hq hᵀ)] δ2

With chunk steps a token reads the state before its chunk, and nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    tile_tokens,
    token_gates,
)
from .tiles import activate, dot, layer_norm
from .write import network


@triton.jit
def mixed(
    b_x, b_beta, b_f, p_w, p_s, p_init, i_r, i_c, BR: tl.constexpr, BC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """``β ⊙ (x W) + f ⊙ (x S) + (1 − β) ⊙ (x W_init)`` for ``[BR, BC]`` of a layer ``[R, C]``."""
    b_y = b_beta[:, None] * dot(b_x, load_part(p_w, i_r, i_c, BR, BC, R, C))
    if M.HAS_MOMENTUM:
        b_y += b_f[:, None] * dot(b_x, load_part(p_s, i_r, i_c, BR, BC, R, C))
    if M.HAS_INIT:
        b_y += (1 - b_beta)[:, None] * dot(b_x, load_part(p_init, i_r, i_c, BR, BC, R, C))
    return b_y


@triton.jit
def mixed_gain(b_beta, b_f, b_c, b_dg, p_w, p_s, p_init, o_d, m_d, M: tl.constexpr):
    """``1 + γ`` at every token ``[BT, BD]``."""
    b_gain = 1 + b_beta[:, None] * tl.load(p_w + o_d, mask=m_d, other=0.0)[None, :]
    if M.HAS_MOMENTUM:
        b_gain += b_f[:, None] * tl.load(p_s + o_d, mask=m_d, other=0.0)[None, :]
    if M.HAS_INIT:
        b_gain += (1 - b_beta)[:, None] * tl.load(p_init + o_d, mask=m_d, other=0.0)[None, :]
    return b_gain - dot(b_c.to(b_dg.dtype), b_dg)


@triton.jit
def inner_output(
    t, f, b_q, b_c, b_beta, b_f, i_th, m_t, p_w, p_s, p_init, M: tl.constexpr
):  # fmt: skip
    """The network's output ``[BT, BD]``, before LayerNorm if there is one."""
    b_k = load_tile(t.k, i_th, m_t, 0, M.BD, M.D, M)
    b_a = (b_c * dot(b_q, tl.trans(b_k))).to(b_q.dtype)  # [BT, BT]
    b_y = tl.zeros([M.BT, M.BD], tl.float32)
    b_hh = tl.zeros([M.BT, M.BT], tl.float32)
    for i_e in tl.range(0, M.E, M.BE, disable_licm=True):
        b_hq, b_h = hidden_at_every_token(
            t, f, b_q, b_a, b_beta, b_f, i_th, m_t, i_e, p_w, p_s, p_init, M
        )  # fmt: skip
        # the last product of a loop tells Triton how to spread all of them over warps: a wide one
        b_hh = dot(b_hq, tl.trans(b_h), b_hh)
        b_y += mixed(
            b_hq, b_beta, b_f, p_w + M.LAST, p_s + M.LAST, p_init + M.LAST,
            i_e, 0, M.BE, M.BD, M.E, M.D, M,
        )  # fmt: skip
    b_d2 = load_tile(f.d2, i_th, m_t, 0, M.BD, M.D, M)
    return b_y - dot((b_c * b_hh).to(b_q.dtype), b_d2)


@triton.jit
def hidden_at_every_token(
    t, f, b_q, b_a, b_beta, b_f, i_th, m_t, i_e, p_w, p_s, p_init, M: tl.constexpr
):  # fmt: skip
    """``hq`` and ``h`` ``[BT, BE]``: what the last layer is given by queries and keys."""
    if M.DEPTH == 2:
        b_z = mixed(b_q, b_beta, b_f, p_w, p_s, p_init, 0, i_e, M.BD, M.BE, M.D, M.E, M)
        b_d1 = load_tile(f.d1, i_th, m_t, i_e, M.BE, M.E, M)
        b_hq = activate(b_z - dot(b_a, b_d1), M.ACT).to(b_q.dtype)
        b_h = load_tile(f.h, i_th, m_t, i_e, M.BE, M.E, M)
    else:
        b_hq = load_tile(t.q, i_th, m_t, i_e, M.BE, M.D, M)
        b_h = load_tile(t.k, i_th, m_t, i_e, M.BE, M.D, M)
    return b_hq, b_h


@triton.jit(do_not_specialize=["T", "C", "N"])
def causal_read_fwd_kernel(t, s, f, rows, p_out, T, C, N, M: tl.constexpr):
    """``y = M(q; W_t)``. Grid (rows · H, tiles of a row)."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    n = tl.program_id(1)
    begin, length, start = row_span(rows, i_n, T, M)
    n_tiles, slot = row_tiles(length, start, C, M), first_slot(begin, i_n, C, M)
    if n < n_tiles:
        per_chunk = tl.cdiv(C, M.BT)
        i_c = n // per_chunk
        i_t, m_t = tile_tokens(i_c, n % per_chunk, length, start, C, M)
        i_th = (begin + i_t) * M.H + i_h
        o_d = tl.arange(0, M.BD)
        m_d = o_d < M.D
        b_q = load_tile(t.q, i_th, m_t, 0, M.BD, M.D, M)
        first = n if M.TOKEN_STEPS else i_c * per_chunk
        before = (state_index(first, n_tiles, i_n, slot, N, M) * M.H + i_h) * M.P
        p_w = s.weights + before
        if M.TOKEN_STEPS:
            p_s, p_init = s.trace + before, p_w
            if M.HAS_INIT:
                p_init = s.init + (i_n * M.H + i_h) * M.P
            b_eta, b_a = token_gates(t, i_th, m_t, M)
            b_c, _, b_beta, b_f, _ = recursions(b_eta, b_a, m_t, 0, M)
            b_c *= load_vector(f.rate, i_th, m_t, M)[None, :]
            b_y = inner_output(
                t, f, b_q, b_c, b_beta, b_f, i_th, m_t, p_w, p_s, p_init, M
            )  # fmt: skip
            if M.RESIDUAL_NORM:
                b_dg = load_tile(f.dg, i_th, m_t, 0, M.BD, M.D, M)
                b_gain = mixed_gain(
                    b_beta, b_f, b_c, b_dg, p_w + M.GAIN, p_s + M.GAIN, p_init + M.GAIN, o_d, m_d, M
                )  # fmt: skip
        else:
            b_y, _ = network(b_q, t.q, i_th, m_t, p_w, M)
            if M.RESIDUAL_NORM:
                b_gain = 1 + tl.load(p_w + M.GAIN + o_d, mask=m_d, other=0.0)[None, :]
        if M.RESIDUAL_NORM:
            b_y = b_q.to(tl.float32) + b_gain * layer_norm(b_y, m_d, M.D)[0]
        store_tile(p_out, b_y, i_th, m_t, 0, M.BD, M.D, M)
