"""Backward of :mod:`.write`: chunk after chunk from the last, three stages each, meeting in memory.

* :func:`retreat_chunk` takes the gradient of the state behind every tile of the chunk to the one
  before it, as far as it passes through the state itself and through the reads of the tile;
* :func:`factors_bwd`: from there to the factors of every token's gradient, and through those
  (second order) to tokens, rate, and per token to what the anchor's gradient is made of;
* :func:`anchor_chunk` sums that over the chunk and adds it to the gradient of the anchor.

The factors and the states before every tile are those of the forward pass, which is run again.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    anchor_index,
    first_slot,
    last_row,
    load_part,
    load_tile,
    load_vector,
    recursions,
    row_chunks,
    row_span,
    row_tiles,
    shifted,
    state_index,
    store_part,
    store_tile,
    store_vector,
    tile_tokens,
    token_gates,
)
from .tiles import (
    activate,
    activate_derivative,
    activate_second_derivative,
    dot,
    first_order,
    layer_norm,
    layer_norm_bwd,
)
from .write import inner_error, network, summed_gradient


class Gradients(NamedTuple):
    """Per token, what the stages leave each other. float32, but for operands of products alone.

    ``k, h, d1, d2, dg, rate`` are gradients of the keys and of :class:`.write.Factors`; the last
    stage overwrites ``h`` with ``dz``, ``d1`` with ``du``, ``d2`` with ``do`` and ``dg`` with
    ``dγ``. ``hq, zq, oq, gq, beta, f`` and ``decays`` ``[BT]`` stand for the reads, ``w`` ``[BT]``,
    ``dbeta, df, on_w, on_s`` are gradients of the tile's coefficients, and ``tile`` ``[slots, H,
    slices, 3, 3]`` those of its β, f, ε, in parts.
    """

    k: Tensor
    h: Tensor | None
    d1: Tensor | None
    d2: Tensor
    dg: Tensor | None
    rate: Tensor
    hq: Tensor | None
    zq: Tensor | None
    oq: Tensor | None
    gq: Tensor | None
    beta: Tensor | None
    f: Tensor | None
    decays: Tensor | None
    w: Tensor | None
    dbeta: Tensor | None
    df: Tensor | None
    on_w: Tensor | None
    on_s: Tensor | None
    tile: Tensor


class Carried(NamedTuple):
    """Gradients ``[N, H, P]`` of the state before the current chunk, of init and of the anchors.

    ``anchor`` is the one given, ``returned`` the other; ``tile_*`` are gradients of the state
    behind every tile of the chunk.
    """

    weights: Tensor
    trace: Tensor
    init: Tensor | None
    anchor: Tensor | None
    returned: Tensor | None
    tile_weights: Tensor
    tile_trace: Tensor


class Results(NamedTuple):
    """Gradients of the arguments of the op, and the gradient of the surprise that is given."""

    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    decay: Tensor | None
    surprise: Tensor


@triton.jit
def behind_tile(i_n, slot, n, i_j, C, M: tl.constexpr):
    """Where the gradient of the state behind a tile stands."""
    index = slot + n
    if not M.ONE_CHUNK:
        index = i_n * tl.cdiv(C, M.BT) + i_j
    return index


# --- through the states ---------------------------------------------------------------------------


@triton.jit
def retreat_layer(
    s, f, g, c, p_x, p_y, i_x, i_y, BX: tl.constexpr, BY: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, OFFSET: tl.constexpr,
    LAYER: tl.constexpr, i_slice, n_slices,
    begin, length, start, i_n, i_h, i_c, slot, C, N, M: tl.constexpr,
):  # fmt: skip
    """Backward over the tiles of chunk ``i_c`` on ``[BX, BY]`` of a layer.

    As::

        dW ← β dW + Σ_t β_t x_t ⊗ dy_t      dS ← ε dS + f dW + Σ_t f_t x_t ⊗ dy_t

    with the reads ``x_t`` and their gradients ``dy_t``; the parts of dβ, df and dε that this slice
    sees.
    """
    per_chunk = tl.cdiv(C, M.BT)
    n_tiles = row_tiles(length, start, C, M)
    first = i_c * per_chunk
    count = tl.minimum(per_chunk, n_tiles - first)
    here = (i_n * M.H + i_h) * M.P + OFFSET
    b_dw = load_part(c.weights + here, i_x, i_y, BX, BY, X, Y)
    b_ds = load_part(c.trace + here, i_x, i_y, BX, BY, X, Y)
    b_di = tl.zeros_like(b_dw)
    for i_back in range(0, count):
        i_j = count - 1 - i_back
        n = first + i_j
        behind = (behind_tile(i_n, slot, n, i_j, C, M) * M.H + i_h) * M.P + OFFSET
        store_part(c.tile_weights + behind, b_dw, i_x, i_y, BX, BY, X, Y)
        store_part(c.tile_trace + behind, b_ds, i_x, i_y, BX, BY, X, Y)
        before = (state_index(n, n_tiles, i_n, slot, N, M) * M.H + i_h) * M.P + OFFSET
        b_w = load_part(s.weights + before, i_x, i_y, BX, BY, X, Y)
        b_s = load_part(s.trace + before, i_x, i_y, BX, BY, X, Y)
        if M.HAS_INIT:
            b_w -= load_part(s.init + here, i_x, i_y, BX, BY, X, Y)
        p_part = g.tile + (((slot + n) * M.H + i_h) * n_slices + i_slice) * 9 + LAYER * 3
        tl.store(p_part, tl.sum(b_dw * b_w))
        tl.store(p_part + 1, tl.sum(b_dw * b_s))
        tl.store(p_part + 2, tl.sum(b_ds * b_s))
        p_tile = f.tile + ((slot + n) * M.H + i_h) * 4
        beta, on_trace, e0 = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
        b_di += (1 - beta) * b_dw
        b_ds = e0 * b_ds + on_trace * b_dw
        b_dw = beta * b_dw
        if M.READS and M.TOKEN_STEPS:
            i_t, m_t = tile_tokens(i_c, i_j, length, start, C, M)
            i_th = (begin + i_t) * M.H + i_h
            b_x = load_tile(p_x, i_th, m_t, i_x, BX, X, M)
            b_y = load_tile(p_y, i_th, m_t, i_y, BY, Y, M)
            b_beta = load_vector(g.beta, i_th, m_t, M)
            b_dw += summed_gradient(b_beta, b_x, b_y)
            if M.HAS_MOMENTUM:
                b_f = load_vector(g.f, i_th, m_t, M)
                b_ds += summed_gradient(b_f, b_x, b_y)
            if M.HAS_INIT:
                b_di += summed_gradient(tl.where(m_t, 1 - b_beta, 0.0), b_x, b_y)
    store_part(c.weights + here, b_dw, i_x, i_y, BX, BY, X, Y)
    store_part(c.trace + here, b_ds, i_x, i_y, BX, BY, X, Y)
    if M.HAS_INIT:
        b_di += load_part(c.init + here, i_x, i_y, BX, BY, X, Y)
        store_part(c.init + here, b_di, i_x, i_y, BX, BY, X, Y)


@triton.jit
def retreat_gain(
    s, f, g, c, i_slice, n_slices,
    begin, length, start, i_n, i_h, i_c, slot, C, N, M: tl.constexpr,
):  # fmt: skip
    """:func:`retreat_layer` of γ ``[D]``."""
    per_chunk = tl.cdiv(C, M.BT)
    n_tiles = row_tiles(length, start, C, M)
    first = i_c * per_chunk
    count = tl.minimum(per_chunk, n_tiles - first)
    o_d = tl.arange(0, M.BD)
    m_d = o_d < M.D
    o_here = (i_n * M.H + i_h) * M.P + M.GAIN + o_d
    b_dw = tl.load(c.weights + o_here, mask=m_d, other=0.0)
    b_ds = tl.load(c.trace + o_here, mask=m_d, other=0.0)
    b_di = tl.zeros_like(b_dw)
    for i_back in range(0, count):
        i_j = count - 1 - i_back
        n = first + i_j
        o_behind = (behind_tile(i_n, slot, n, i_j, C, M) * M.H + i_h) * M.P + M.GAIN + o_d
        tl.store(c.tile_weights + o_behind, b_dw, mask=m_d)
        tl.store(c.tile_trace + o_behind, b_ds, mask=m_d)
        before = (state_index(n, n_tiles, i_n, slot, N, M) * M.H + i_h) * M.P + M.GAIN
        b_w = tl.load(s.weights + before + o_d, mask=m_d, other=0.0)
        b_s = tl.load(s.trace + before + o_d, mask=m_d, other=0.0)
        if M.HAS_INIT:
            b_w -= tl.load(s.init + o_here, mask=m_d, other=0.0)
        p_part = g.tile + (((slot + n) * M.H + i_h) * n_slices + i_slice) * 9 + 6
        tl.store(p_part, tl.sum(b_dw * b_w))
        tl.store(p_part + 1, tl.sum(b_dw * b_s))
        tl.store(p_part + 2, tl.sum(b_ds * b_s))
        p_tile = f.tile + ((slot + n) * M.H + i_h) * 4
        beta, on_trace, e0 = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
        b_di += (1 - beta) * b_dw
        b_ds = e0 * b_ds + on_trace * b_dw
        b_dw = beta * b_dw
        if M.READS and M.TOKEN_STEPS:
            i_t, m_t = tile_tokens(i_c, i_j, length, start, C, M)
            i_th = (begin + i_t) * M.H + i_h
            b_y = load_tile(g.gq, i_th, m_t, 0, M.BD, M.D, M)
            b_beta = load_vector(g.beta, i_th, m_t, M)[:, None]
            b_f = load_vector(g.f, i_th, m_t, M)[:, None]
            b_dw += tl.sum(b_beta * b_y, 0)
            if M.HAS_MOMENTUM:
                b_ds += tl.sum(b_f * b_y, 0)
            b_di += tl.sum((1 - b_beta) * b_y, 0)
    tl.store(c.weights + o_here, b_dw, mask=m_d)
    tl.store(c.trace + o_here, b_ds, mask=m_d)
    if M.HAS_INIT:
        b_di += tl.load(c.init + o_here, mask=m_d, other=0.0)
        tl.debug_barrier()  # all warps load what one of them overwrites
        tl.store(c.init + o_here, b_di, mask=m_d)


@triton.jit
def retreat_chunk(
    t, s, f, g, c, begin, length, start, i_n, i_h, i_c, i_slice, slot, C, N, M: tl.constexpr
):  # fmt: skip
    """The tiles of chunk ``i_c``, backwards, on one slice of every layer."""
    i_e, n_slices = i_slice * M.BE, tl.cdiv(M.E, M.BE)
    p_hq = t.q
    if M.DEPTH == 2:
        p_hq = g.hq
        retreat_layer(
            s, f, g, c, t.q, g.zq, 0, i_e, M.BD, M.BE, M.D, M.E, 0, 0, i_slice, n_slices,
            begin, length, start, i_n, i_h, i_c, slot, C, N, M,
        )  # fmt: skip
    retreat_layer(
        s, f, g, c, p_hq, g.oq, i_e, 0, M.BE, M.BD, M.E, M.D, M.LAST, 1, i_slice, n_slices,
        begin, length, start, i_n, i_h, i_c, slot, C, N, M,
    )  # fmt: skip
    if M.RESIDUAL_NORM:
        if i_slice == 0:
            retreat_gain(
                s, f, g, c, i_slice, n_slices,
                begin, length, start, i_n, i_h, i_c, slot, C, N, M,
            )  # fmt: skip


# --- through the factors --------------------------------------------------------------------------


@triton.jit
def accumulate(p, b_x, i_th, m_t, i_c, BC: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Stores onto what the read's backward left there, if it ran."""
    if M.READS and M.TOKEN_STEPS:
        b_x += load_tile(p, i_th, m_t, i_c, BC, C, M)
    store_tile(p, b_x, i_th, m_t, i_c, BC, C, M)


@triton.jit
def both(b_on_w, b_on_s, b_w, b_s):
    """``−(on_w ⊙ w + on_s ⊙ s)``, rows ``[BT, ·]``."""
    return -(b_on_w[:, None] * b_w + b_on_s[:, None] * b_s)


@triton.jit
def update_bwd(t, f, g, i_th, m_t, p_dw, p_ds, M: tl.constexpr):
    """From the gradients of the state behind a tile to keys, factors and their weights in the tile.

    ``dδ = −on_w (x dW) − on_s (x dS)``, ``dx = −on_w (δ dWᵀ) − on_s (δ dSᵀ)``, ``d on_w = −x dW ·
    δ``.
    """
    o_d = tl.arange(0, M.BD)
    m_d = o_d < M.D
    b_k = load_tile(t.k, i_th, m_t, 0, M.BD, M.D, M)  # [BT, BD]
    b_d2 = load_tile(f.d2, i_th, m_t, 0, M.BD, M.D, M)
    b_on_w = load_vector(f.on_w, i_th, m_t, M)
    b_on_s = b_on_w
    if M.TOKEN_STEPS:
        b_on_s = load_vector(f.on_s, i_th, m_t, M)
    b_dk = tl.zeros([M.BT, M.BD], tl.float32)
    b_dd2 = tl.zeros([M.BT, M.BD], tl.float32)
    b_dw, b_ds = tl.zeros([M.BT], tl.float32), tl.zeros([M.BT], tl.float32)
    for i_e in range(0, M.E, M.BE):
        if M.DEPTH == 2:
            b_h = load_tile(f.h, i_th, m_t, i_e, M.BE, M.E, M)
            b_d1 = load_tile(f.d1, i_th, m_t, i_e, M.BE, M.E, M)
            b_dw1 = load_part(p_dw, 0, i_e, M.BD, M.BE, M.D, M.E)
            b_ds1 = load_part(p_ds, 0, i_e, M.BD, M.BE, M.D, M.E)
            b_xw, b_xs = dot(b_k, b_dw1), dot(b_k, b_ds1)
            accumulate(g.d1, both(b_on_w, b_on_s, b_xw, b_xs), i_th, m_t, i_e, M.BE, M.E, M)
            b_dw -= tl.sum(b_xw * b_d1, 1)
            b_ds -= tl.sum(b_xs * b_d1, 1)
            b_xw, b_xs = dot(b_d1, tl.trans(b_dw1)), dot(b_d1, tl.trans(b_ds1))
            b_dk += both(b_on_w, b_on_s, b_xw, b_xs)
        else:
            b_h = load_tile(t.k, i_th, m_t, i_e, M.BE, M.D, M)
        b_dw2 = load_part(p_dw + M.LAST, i_e, 0, M.BE, M.BD, M.E, M.D)
        b_ds2 = load_part(p_ds + M.LAST, i_e, 0, M.BE, M.BD, M.E, M.D)
        b_dd2 += both(b_on_w, b_on_s, dot(b_h, b_dw2), dot(b_h, b_ds2))
        b_xw, b_xs = dot(b_d2, tl.trans(b_dw2)), dot(b_d2, tl.trans(b_ds2))
        p_h = g.h if M.DEPTH == 2 else g.k
        accumulate(p_h, both(b_on_w, b_on_s, b_xw, b_xs), i_th, m_t, i_e, M.BE, M.E, M)
        b_dw -= tl.sum(b_xw * b_h, 1)
        b_ds -= tl.sum(b_xs * b_h, 1)
    if M.DEPTH == 2:
        accumulate(g.k, b_dk, i_th, m_t, 0, M.BD, M.D, M)
    accumulate(g.d2, b_dd2, i_th, m_t, 0, M.BD, M.D, M)
    if M.RESIDUAL_NORM:
        b_dg = load_tile(f.dg, i_th, m_t, 0, M.BD, M.D, M)
        b_xw = tl.load(p_dw + M.GAIN + o_d, mask=m_d, other=0.0)[None, :]
        b_xs = tl.load(p_ds + M.GAIN + o_d, mask=m_d, other=0.0)[None, :]
        accumulate(g.dg, both(b_on_w, b_on_s, b_xw, b_xs), i_th, m_t, 0, M.BD, M.D, M)
        b_dw -= tl.sum(b_xw * b_dg, 1)
        b_ds -= tl.sum(b_xs * b_dg, 1)
    rate_bwd(t, f, g, i_th, m_t, b_dw, b_ds, M)


@triton.jit
def rate_bwd(t, f, g, i_th, m_t, b_dw, b_ds, M: tl.constexpr):
    """From ``on_w = w rate`` and ``on_s = E rate`` to ``w``, ``E`` and ``rate``."""
    if M.TOKEN_STEPS:
        b_rate = load_vector(f.rate, i_th, m_t, M)
        b_w, b_e, _, _, _ = last_row(t, i_th, m_t, M)
        store_vector(g.on_w, b_dw * b_rate, i_th, m_t, M)
        store_vector(g.on_s, b_ds * b_rate, i_th, m_t, M)
        b_drate = b_w * b_dw + b_e * b_ds
        if M.READS:
            b_drate += load_vector(g.rate, i_th, m_t, M)
            tl.debug_barrier()  # all warps load what one of them overwrites
    else:
        b_drate = b_dw + b_ds
    store_vector(g.rate, b_drate, i_th, m_t, M)


@triton.jit
def error_bwd(b_dd2, b_ddg, b_d2, b_dsurprise, b_o, b_error, p_w, m_d, M: tl.constexpr):
    """Second order through :func:`.write.inner_error`: to ``h W2``, ``k − v`` and γ.

    ``δ2 = P d / σ`` with ``d = 2 error ⊙ gain`` and ``P`` LayerNorm's symmetric projection.
    """
    b_derror = 2 * b_dsurprise[:, None] * b_error
    if M.RESIDUAL_NORM:
        b_normed, b_scale = layer_norm(b_o, m_d, M.D)
        b_gain = 1 + tl.load(p_w + M.GAIN + tl.arange(0, M.BD), mask=m_d, other=0.0)[None, :]
        b_d = 2 * b_error * b_gain
        b_dd = layer_norm_bwd(b_dd2, b_normed, b_scale, m_d, M.D)
        along_d = (tl.sum(b_d * b_normed, 1) / M.D * b_scale)[:, None]
        along_dd2 = (tl.sum(b_dd2 * b_normed, 1) / M.D * b_scale)[:, None]
        b_derror += 2 * (b_dd * b_gain + b_ddg * b_normed)
        b_dgamma = 2 * b_dd * b_error + b_derror * b_normed
        b_dnormed = 2 * b_ddg * b_error + b_derror * b_gain - b_dd2 * along_d - b_d * along_dd2
        b_do = layer_norm_bwd(b_dnormed, b_normed, b_scale, m_d, M.D)
        b_do -= b_normed * (tl.sum(b_dd2 * b_d2, 1) * b_scale / M.D)[:, None]
    else:
        b_derror += 2 * b_dd2
        b_do, b_dgamma = b_derror, b_derror
    return b_do, b_derror, b_dgamma


@triton.jit
def factors_bwd(t, f, g, r, i_th, m_t, p_w, M: tl.constexpr):
    """Second order: from the gradients of a tile's factors, through them, at the anchor ``p_w``."""
    o_d = tl.arange(0, M.BD)
    m_d = o_d < M.D
    b_k = load_tile(t.k, i_th, m_t, 0, M.BD, M.D, M)  # [BT, BD]
    b_o, b_hh = network(b_k, t.k, i_th, m_t, p_w, M)
    b_v = load_tile(t.v, i_th, m_t, 0, M.BD, M.D, M)
    _, b_d2, _ = inner_error(b_o, b_k, b_v, p_w, m_d, M)
    b_dsquare = clip_bwd(t, f, g, r, i_th, m_t, M)  # of ‖g_s‖², twice
    b_dd2 = load_tile(g.d2, i_th, m_t, 0, M.BD, M.D, M)
    b_dd2 += (b_dsquare * b_hh)[:, None] * b_d2
    b_d2d2 = b_dsquare * tl.sum(b_d2 * b_d2, 1)
    b_k32 = b_k.to(tl.float32)
    b_kk = b_dsquare * tl.sum(b_k32 * b_k32, 1)
    b_dkk = b_d2d2
    if M.DEPTH == 2:
        b_d1d1 = tl.zeros([M.BT], tl.float32)
        for i_e in range(0, M.E, M.BE):
            b_z = dot(b_k, load_part(p_w, 0, i_e, M.BD, M.BE, M.D, M.E))  # [BT, BE]
            b_w2 = load_part(p_w + M.LAST, i_e, 0, M.BE, M.BD, M.E, M.D)
            b_u = dot(b_d2.to(b_k.dtype), tl.trans(b_w2))
            b_slope = activate_derivative(b_z, M.ACT)
            b_d1 = b_u * b_slope
            b_d1d1 += tl.sum(b_d1 * b_d1, 1)
            b_dd1 = load_tile(g.d1, i_th, m_t, i_e, M.BE, M.E, M) + b_kk[:, None] * b_d1
            b_dh = load_tile(g.h, i_th, m_t, i_e, M.BE, M.E, M)
            b_dh += b_d2d2[:, None] * activate(b_z, M.ACT)
            b_du = b_dd1 * b_slope
            b_dz = b_dd1 * b_u * activate_second_derivative(b_z, M.ACT) + b_dh * b_slope
            b_dd2 = dot(b_du.to(b_k.dtype), b_w2, b_dd2)
            store_tile(g.d1, b_du, i_th, m_t, i_e, M.BE, M.E, M)
            store_tile(g.h, b_dz, i_th, m_t, i_e, M.BE, M.E, M)
        b_dkk = b_dsquare * b_d1d1
    # read and computed again: held over the loop they would not fit into registers
    b_v = load_tile(t.v, i_th, m_t, 0, M.BD, M.D, M)
    b_error, b_d2, b_dg = inner_error(b_o, b_k, b_v, p_w, m_d, M)
    b_ddg = tl.zeros_like(b_dd2)
    if M.RESIDUAL_NORM:
        b_ddg = load_tile(g.dg, i_th, m_t, 0, M.BD, M.D, M) + b_dsquare[:, None] * b_dg
    b_dsurprise = load_vector(r.surprise, i_th, m_t, M)
    b_do, b_derror, b_dgamma = error_bwd(b_dd2, b_ddg, b_d2, b_dsurprise, b_o, b_error, p_w, m_d, M)
    store_tile(r.v, -b_derror, i_th, m_t, 0, M.BD, M.D, M)
    store_tile(g.d2, b_do, i_th, m_t, 0, M.BD, M.D, M)
    b_dk = load_tile(g.k, i_th, m_t, 0, M.BD, M.D, M) + b_dkk[:, None] * b_k.to(tl.float32)
    if M.RESIDUAL_NORM:
        b_dk += b_derror
        store_tile(g.dg, b_dgamma, i_th, m_t, 0, M.BD, M.D, M)
    network_bwd(t, g, r, b_k, b_do.to(b_k.dtype), b_dk, i_th, m_t, p_w, M)


@triton.jit
def clip_bwd(t, f, g, r, i_th, m_t, M: tl.constexpr):
    """``rate = θ min(1, max_norm / ‖g‖)``: stores dθ, returns twice the gradient of ``‖g‖²``."""
    b_drate = load_vector(g.rate, i_th, m_t, M)
    b_dsquare = tl.zeros([M.BT], tl.float32)
    if M.CLIPS:
        least = M.MAX_NORM * M.MAX_NORM
        b_square = load_vector(f.square, i_th, m_t, M)
        b_rate = load_vector(f.rate, i_th, m_t, M)
        b_dsquare = tl.where(b_square > least, -b_drate * b_rate / tl.maximum(b_square, least), 0.0)
        b_drate *= M.MAX_NORM * tl.rsqrt(tl.maximum(b_square, least))
    store_vector(r.lr, b_drate.to(r.lr.dtype.element_ty), i_th, m_t, M)
    return b_dsquare


@triton.jit
def network_bwd(t, g, r, b_k, b_do, b_dk, i_th, m_t, p_w, M: tl.constexpr):
    """From ``do`` ``[BT, BD]``: ``dz += (do W2ᵀ) ⊙ act'(z)``, ``dk += dz W1ᵀ``."""
    if M.DEPTH == 1:
        store_tile(g.k, b_dk, i_th, m_t, 0, M.BD, M.D, M)
    tl.debug_barrier()  # what one thread stored, another loads
    for i_e in range(0, M.E, M.BE):
        b_dh = dot(
            b_do, tl.trans(load_part(p_w + M.LAST, i_e, 0, M.BE, M.BD, M.E, M.D))
        )  # [BT, BE]
        if M.DEPTH == 2:
            b_w1 = load_part(p_w, 0, i_e, M.BD, M.BE, M.D, M.E)
            b_dz = load_tile(g.h, i_th, m_t, i_e, M.BE, M.E, M)
            b_dz += b_dh * activate_derivative(dot(b_k, b_w1), M.ACT)
            store_tile(g.h, b_dz, i_th, m_t, i_e, M.BE, M.E, M)
            b_dk = dot(b_dz.to(b_k.dtype), tl.trans(b_w1), b_dk)
        else:
            b_dh += load_tile(g.k, i_th, m_t, i_e, M.BE, M.D, M)
            store_tile(r.k, b_dh, i_th, m_t, i_e, M.BE, M.D, M)
    if M.DEPTH == 2:
        store_tile(r.k, b_dk, i_th, m_t, 0, M.BD, M.D, M)


@triton.jit
def tile_bwd(
    t, s, f, g, c, r, begin, length, start, i_n, i_h, i_c, i_j, slot, C, N, M: tl.constexpr
):  # fmt: skip
    """:func:`update_bwd`, then :func:`factors_bwd`, of tile ``i_j`` of chunk ``i_c``."""
    n_tiles = row_tiles(length, start, C, M)
    i_t, m_t = tile_tokens(i_c, i_j, length, start, C, M)
    i_th = (begin + i_t) * M.H + i_h
    n = i_c * tl.cdiv(C, M.BT) + i_j
    behind = (behind_tile(i_n, slot, n, i_j, C, M) * M.H + i_h) * M.P
    update_bwd(t, f, g, i_th, m_t, c.tile_weights + behind, c.tile_trace + behind, M)
    tl.debug_barrier()  # what one thread stored, another loads
    anchor = anchor_index(i_c, n_tiles, start, i_n, slot, C, N, M)
    factors_bwd(t, f, g, r, i_th, m_t, s.weights + (anchor * M.H + i_h) * M.P, M)


# --- to the anchor --------------------------------------------------------------------------------


@triton.jit
def product_sum(
    b_sum, p_x, p_y, i_th, m_t, i_x, i_y, BX: tl.constexpr, BY: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, dtype, M: tl.constexpr,
):  # fmt: skip
    """``+ Σ_t x_t ⊗ y_t`` of a tile."""
    b_x = load_tile(p_x, i_th, m_t, i_x, BX, X, M).to(dtype)
    return dot(tl.trans(b_x), load_tile(p_y, i_th, m_t, i_y, BY, Y, M), b_sum)


@triton.jit
def anchor_chunk(
    t, f, g, c, begin, length, start, i_n, i_h, i_c, i_slice, C, M: tl.constexpr
):  # fmt: skip
    """Adds to the anchor's gradient: ``dW1 = Σ k ⊗ dz``, ``dW2 = Σ du ⊗ δ2 + h ⊗ do``."""
    i_e, o_d = i_slice * M.BE, tl.arange(0, M.BD)
    m_d = o_d < M.D
    n_tiles, per_chunk = row_tiles(length, start, C, M), tl.cdiv(C, M.BT)
    dtype = t.k.dtype.element_ty
    b_dw1 = tl.zeros([M.BD, M.BE], tl.float32)
    b_dw2 = tl.zeros([M.BE, M.BD], tl.float32)
    b_dgamma = tl.zeros([M.BD], tl.float32)
    for i_j in range(0, tl.minimum(per_chunk, n_tiles - i_c * per_chunk)):
        i_t, m_t = tile_tokens(i_c, i_j, length, start, C, M)
        i_th = (begin + i_t) * M.H + i_h
        if M.DEPTH == 2:
            b_dw1 = product_sum(
                b_dw1, t.k, g.h, i_th, m_t, 0, i_e, M.BD, M.BE, M.D, M.E, dtype, M
            )  # fmt: skip
            b_dw2 = product_sum(
                b_dw2, g.d1, f.d2, i_th, m_t, i_e, 0, M.BE, M.BD, M.E, M.D, dtype, M
            )  # fmt: skip
            b_dw2 = product_sum(
                b_dw2, f.h, g.d2, i_th, m_t, i_e, 0, M.BE, M.BD, M.E, M.D, dtype, M
            )  # fmt: skip
        else:
            b_dw2 = product_sum(
                b_dw2, t.k, g.d2, i_th, m_t, i_e, 0, M.BE, M.BD, M.E, M.D, dtype, M
            )  # fmt: skip
        if M.RESIDUAL_NORM:
            b_dgamma += tl.sum(load_tile(g.dg, i_th, m_t, 0, M.BD, M.D, M), 0)
        if M.READS and not M.TOKEN_STEPS:
            p_hq = t.q
            if M.DEPTH == 2:
                p_hq = g.hq
                b_dw1 = product_sum(
                b_dw1, t.q, g.zq, i_th, m_t, 0, i_e, M.BD, M.BE, M.D, M.E, dtype, M
            )  # fmt: skip
            b_dw2 = product_sum(
                b_dw2, p_hq, g.oq, i_th, m_t, i_e, 0, M.BE, M.BD, M.E, M.D, dtype, M
            )  # fmt: skip
            if M.RESIDUAL_NORM:
                b_dgamma += tl.sum(load_tile(g.gq, i_th, m_t, 0, M.BD, M.D, M), 0)
    here = (i_n * M.H + i_h) * M.P
    if M.KEEPS_ANCHOR:
        if i_c == row_chunks(length, start, C) - 1:
            p_returned = c.returned + here
            if M.DEPTH == 2:
                b_dw1 += load_part(p_returned, 0, i_e, M.BD, M.BE, M.D, M.E)
            b_dw2 += load_part(p_returned + M.LAST, i_e, 0, M.BE, M.BD, M.E, M.D)
            if M.RESIDUAL_NORM:
                b_dgamma += tl.load(p_returned + M.GAIN + o_d, mask=m_d, other=0.0)
    if M.HAS_POSITION:
        if i_c == 0 and start > 0:
            add_slice(c.anchor + here, b_dw1, b_dw2, b_dgamma, i_slice, M)
        else:
            add_slice(c.weights + here, b_dw1, b_dw2, b_dgamma, i_slice, M)
    else:
        add_slice(c.weights + here, b_dw1, b_dw2, b_dgamma, i_slice, M)


@triton.jit
def add_slice(p, b_dw1, b_dw2, b_dgamma, i_slice, M: tl.constexpr):
    """``+=`` on a slice of every layer of a packed state."""
    i_e = i_slice * M.BE
    if M.DEPTH == 2:
        b_dw1 += load_part(p, 0, i_e, M.BD, M.BE, M.D, M.E)
        store_part(p, b_dw1, 0, i_e, M.BD, M.BE, M.D, M.E)
    b_dw2 += load_part(p + M.LAST, i_e, 0, M.BE, M.BD, M.E, M.D)
    store_part(p + M.LAST, b_dw2, i_e, 0, M.BE, M.BD, M.E, M.D)
    if M.RESIDUAL_NORM:
        if i_slice == 0:
            o_d = tl.arange(0, M.BD)
            p_gain, m_d = p + M.GAIN + o_d, o_d < M.D
            b_dgamma += tl.load(p_gain, mask=m_d, other=0.0)
            tl.debug_barrier()  # all warps load what one of them overwrites
            tl.store(p_gain, b_dgamma, mask=m_d)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "C", "N", "i_c"])
def state_bwd_kernel(t, s, f, g, c, rows, T, C, N, i_c, M: tl.constexpr):
    """:func:`retreat_chunk`. Grid (rows · H, slices of the hidden width)."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    begin, length, start = row_span(rows, i_n, T, M)
    if i_c < row_chunks(length, start, C):
        i_slice, slot = tl.program_id(1), first_slot(begin, i_n, C, M)
        retreat_chunk(t, s, f, g, c, begin, length, start, i_n, i_h, i_c, i_slice, slot, C, N, M)


@triton.jit(do_not_specialize=["T", "C", "N", "i_c"])
def factors_bwd_kernel(t, s, f, g, c, r, rows, T, C, N, i_c, M: tl.constexpr):
    """:func:`tile_bwd` of chunk ``i_c``. Grid (rows · H, tiles of a chunk)."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    i_j = tl.program_id(1)
    begin, length, start = row_span(rows, i_n, T, M)
    if i_c * tl.cdiv(C, M.BT) + i_j < row_tiles(length, start, C, M):
        slot = first_slot(begin, i_n, C, M)
        tile_bwd(t, s, f, g, c, r, begin, length, start, i_n, i_h, i_c, i_j, slot, C, N, M)


@triton.jit(do_not_specialize=["T", "C", "N", "i_c"])
def anchor_bwd_kernel(t, f, g, c, rows, T, C, N, i_c, M: tl.constexpr):
    """:func:`anchor_chunk`. Grid (rows · H, slices of the hidden width)."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    begin, length, start = row_span(rows, i_n, T, M)
    if i_c < row_chunks(length, start, C):
        i_slice = tl.program_id(1)
        anchor_chunk(t, f, g, c, begin, length, start, i_n, i_h, i_c, i_slice, C, M)


@triton.jit
def backwards(b_gate, b_d):
    """``y_t = d_t + gate_t y_{t+1}`` along the first dimension."""
    return tl.associative_scan((b_gate, b_d), 0, first_order, reverse=True)[1]


@triton.jit(do_not_specialize=["T", "C"])
def token_gates_bwd_kernel(t, g, r, rows, p_tile, T, C, M: tl.constexpr):
    """Gradients of momentum and decay: :func:`.chunks.recursions` of one tile, backwards.

    ``p_tile`` ``[slots, H, 3]`` are gradients of β, f and ε. Grid (rows · H, tiles of a row).
    """
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    n = tl.program_id(1)
    begin, length, start = row_span(rows, i_n, T, M)
    if n < row_tiles(length, start, C, M):
        per_chunk = tl.cdiv(C, M.BT)
        i_t, m_t = tile_tokens(n // per_chunk, n % per_chunk, length, start, C, M)
        i_th, o_s = (begin + i_t) * M.H + i_h, tl.arange(0, M.BT)
        m_end = o_s == M.BT - 1  # slots behind the last token repeat its row
        p_tile += ((first_slot(begin, i_n, C, M) + n) * M.H + i_h) * 3
        m_before = shifted(m_t, -1, M.BT)
        b_eta, b_a = token_gates(t, i_th + M.H, shifted(m_t, 1, M.BT), M)
        b_eta0, b_a0 = token_gates(t, i_th - M.H, m_before, M)
        b_w, b_e, b_beta, b_f, b_e0 = recursions(b_eta0, b_a0, m_before, 1, M)
        b_dw = load_vector(g.on_w, i_th, m_t, M)
        b_dw = tl.where(m_end[:, None], b_dw[None, :], 0.0)  # [BT, BT]
        b_dbeta = tl.where(m_end, tl.load(p_tile), 0.0)
        b_df = tl.where(m_end, tl.load(p_tile + 1), 0.0)
        if M.READS:
            b_dw += load_tile(g.w, i_th, m_t, 0, M.BT, M.BT, M)
            b_dbeta += load_vector(g.dbeta, i_th, m_t, M)
            b_df += load_vector(g.df, i_th, m_t, M)
        b_columns = tl.broadcast_to(b_a[:, None], [M.BT, M.BT])
        b_dw, b_df = backwards(b_columns, b_dw), backwards(b_a, b_df)
        if M.HAS_DECAY:
            b_da = tl.sum(b_dw * b_w, 1) + backwards(b_a, b_dbeta) * b_beta + b_df * b_f
            store_vector(r.decay, (-b_da).to(r.decay.dtype.element_ty), i_th, m_t, M)
        if M.HAS_MOMENTUM:
            b_de = load_vector(g.on_s, i_th, m_t, M)
            b_de = tl.where(m_end[:, None], b_de[None, :], 0.0) + tl.where(m_t[:, None], b_dw, 0.0)
            b_columns = tl.broadcast_to(b_eta[:, None], [M.BT, M.BT])
            b_de0 = tl.where(m_end, tl.load(p_tile + 2), 0.0) + tl.where(m_t, b_df, 0.0)
            b_deta = tl.sum(backwards(b_columns, b_de) * b_e, 1) + backwards(b_eta, b_de0) * b_e0
            store_vector(r.momentum, b_deta.to(r.momentum.dtype.element_ty), i_th, m_t, M)


@triton.jit(do_not_specialize=["T", "C", "NC"])
def chunk_gates_bwd_kernel(r, rows, p_tile, T, C, NC, M: tl.constexpr):
    """``dη = df + dε``, ``dα = −dβ`` of a chunk's first tile. Grid (rows · H, chunks of a row)."""
    i_n, i_h = tl.program_id(0).to(tl.int64) // M.H, tl.program_id(0).to(tl.int64) % M.H
    i_c = tl.program_id(1)
    begin, length, start = row_span(rows, i_n, T, M)
    if i_c < row_chunks(length, start, C):
        n = i_c * tl.cdiv(C, M.BT)
        has_tokens = n < row_tiles(length, start, C, M)
        p_tile += ((first_slot(begin, i_n, C, M) + n) * M.H + i_h) * 3
        gate = i_n * NC
        if rows.gates is not None:
            gate = tl.load(rows.gates + i_n)
        o_ch = (gate + i_c) * M.H + i_h
        dbeta = tl.load(p_tile, mask=has_tokens, other=0.0)
        deta = tl.load(p_tile + 1, mask=has_tokens, other=0.0)
        deta += tl.load(p_tile + 2, mask=has_tokens, other=0.0)
        if M.HAS_DECAY:
            tl.store(r.decay + o_ch, (-dbeta).to(r.decay.dtype.element_ty))
        if M.HAS_MOMENTUM:
            tl.store(r.momentum + o_ch, deta.to(r.momentum.dtype.element_ty))
