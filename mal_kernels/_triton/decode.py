"""One token a row, written and read in one launch, as :func:`mal_kernels.reference.recurrence`.

A program owns one row and head. With one token every product is of a vector and a matrix, and the
closed form is the recurrence itself::

    S ← η S − θ g        W ← (1 − α) W + α W_init + S        y = M(q; W)        g at the anchor

Both layers are walked in slices of ``BE`` hidden units, twice: for the error, then for the update
of a slice and the read through it; once more between the two where the gradient is clipped. States
are neither packed nor copied: each is read from where it lies and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import MemoryCall
from .memory_read import layers as memory_layers
from .tiles import (
    activate,
    activate_derivative,
    dense,
    launch_options,
    layer_norm,
    layer_norm_bwd,
    load_matrix,
    meta,
    power_of_2,
    store_matrix,
)


class Layers(NamedTuple):
    """``W1`` ``[N, H, D, E]`` (not touched at depth 1), ``W2`` ``[N, H, E, D]``, γ or None."""

    first: Tensor
    last: Tensor
    gain: Tensor | None


@triton.jit
def load_anchor(p_w, p_anchor, inside, o_r, o_c, R: tl.constexpr, C: tl.constexpr):
    """A slice of the weights that the gradient is taken at: the anchor's inside a chunk."""
    mask = (o_r < R)[:, None] & (o_c < C)[None, :]
    o = o_r[:, None] * C + o_c[None, :]
    b_w = tl.load(p_w + o, mask=mask & (inside == 0), other=0.0)
    return b_w + tl.load(p_anchor + o, mask=mask & (inside != 0), other=0.0)


@triton.jit
def stepped(
    b_g, p_w, p_s, p_init, p_new_w, p_new_s, eta, alpha, o_r, o_c,
    R: tl.constexpr, C: tl.constexpr, HAS_MOMENTUM: tl.constexpr, HAS_INIT: tl.constexpr,
):  # fmt: skip
    """A slice of a layer before and after the step ``b_g = θ g``; stores it and its momentum."""
    b_w = load_matrix(p_w, o_r, o_c, R, C)
    b_s = -b_g
    if HAS_MOMENTUM:
        b_s += eta * load_matrix(p_s, o_r, o_c, R, C)
    b_new = (1 - alpha) * b_w + b_s
    if HAS_INIT:
        b_new += alpha * load_matrix(p_init, o_r, o_c, R, C)
    store_matrix(p_new_w, b_new, o_r, o_c, R, C)
    store_matrix(p_new_s, b_s, o_r, o_c, R, C)
    return b_w, b_new


@triton.jit
def hidden_units(
    b_x, p_x, p_w, p_anchor, inside, o_d, o_e,
    D: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """``z`` and ``h`` ``[BE]`` of a slice: ``x W1`` and its activation; at depth 1 ``x`` itself."""
    if DEPTH == 2:
        b_z = tl.sum(b_x[:, None] * load_anchor(p_w, p_anchor, inside, o_d, o_e, D, E), 0)
        b_h = activate(b_z, ACT)
    else:
        b_z = tl.load(p_x + o_e, mask=o_e < E, other=0.0).to(tl.float32)
        b_h = b_z
    return b_z, b_h


@triton.jit(do_not_specialize=["C"])
def decode_fwd_kernel(
    p_q, p_k, p_v, p_lr, p_momentum, p_decay, w, s, anchor, init, p_position,
    new_w, new_s, new_anchor, p_y, p_surprise, p_new_position, C,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DEPTH: tl.constexpr, ACT: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
    CLIPS: tl.constexpr, MAX_NORM: tl.constexpr, TOKEN_STEPS: tl.constexpr,
    READS: tl.constexpr, HAS_MOMENTUM: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_INIT: tl.constexpr, SHARES_INIT: tl.constexpr,
    HAS_POSITION: tl.constexpr, KEEPS_ANCHOR: tl.constexpr,
):  # fmt: skip
    """Everything of one row and head. Grid (rows · H,)."""
    i_nh = tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    o_d, m_d = tl.arange(0, BD), tl.arange(0, BD) < D
    o_1, o_2, o_gain = i_nh * (D * E), i_nh * (E * D), i_nh * D
    i_init = i_h if SHARES_INIT else i_nh
    position, inside = i_n * 0, i_n * 0
    if HAS_POSITION:
        position = tl.load(p_position + i_n)
        inside = (position > 0).to(tl.int64)
    lr = tl.load(p_lr + i_nh).to(tl.float32)
    eta, alpha = 0.0, 0.0
    if HAS_MOMENTUM:
        eta = tl.load(p_momentum + i_nh).to(tl.float32)
    if HAS_DECAY:
        alpha = tl.load(p_decay + i_nh).to(tl.float32)
    b_k = tl.load(p_k + o_gain + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    b_v = tl.load(p_v + o_gain + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_x = p_k + o_gain
    p_w1, p_a1 = w.first + o_1, anchor.first + o_1
    p_w2, p_a2 = w.last + o_2, anchor.last + o_2

    # the error, and the last layer's δ
    b_o = tl.zeros([BD], tl.float32)
    b_hh = tl.zeros([BE], tl.float32)
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        _, b_h = hidden_units(b_k, p_x, p_w1, p_a1, inside, o_d, o_e, D, E, DEPTH, ACT)
        b_o += tl.sum(b_h[:, None] * load_anchor(p_w2, p_a2, inside, o_e, o_d, E, D), 0)
        b_hh += b_h * b_h
    b_error = b_o - b_v
    b_d2 = 2 * b_error
    if RESIDUAL_NORM:
        b_normed, b_scale = layer_norm(b_o[None, :], m_d, D)
        b_gain = tl.load(w.gain + o_gain + o_d, mask=m_d & (inside == 0), other=0.0)
        b_gain += tl.load(anchor.gain + o_gain + o_d, mask=m_d & (inside != 0), other=0.0)
        if KEEPS_ANCHOR:
            tl.store(new_anchor.gain + o_gain + o_d, b_gain, mask=m_d)
        b_error = b_k + (1 + b_gain) * tl.sum(b_normed, 0) - b_v
        b_dg = 2 * b_error * tl.sum(b_normed, 0)
        b_d2 = (2 * b_error * (1 + b_gain))[None, :]
        b_d2 = tl.sum(layer_norm_bwd(b_d2, b_normed, b_scale, m_d, D), 0)
    tl.store(p_surprise + i_nh, tl.sum(b_error * b_error, 0))

    # the rate: θ, and what is left of it when ‖g‖ is bounded
    if CLIPS:
        square = tl.sum(b_d2 * b_d2, 0) * tl.sum(b_hh, 0)
        if RESIDUAL_NORM:
            square += tl.sum(b_dg * b_dg, 0)
        if DEPTH == 2:
            b_square = tl.zeros([BE], tl.float32)
            for i_e in range(0, E, BE):
                o_e = i_e + tl.arange(0, BE)
                b_z, _ = hidden_units(b_k, p_x, p_w1, p_a1, inside, o_d, o_e, D, E, DEPTH, ACT)
                b_a2 = load_anchor(p_w2, p_a2, inside, o_e, o_d, E, D)
                b_d1 = tl.sum(b_a2 * b_d2[None, :], 1) * activate_derivative(b_z, ACT)
                b_square += b_d1 * b_d1
            square += tl.sum(b_square, 0) * tl.sum(b_k * b_k, 0)
        lr *= MAX_NORM * tl.rsqrt(tl.maximum(square, MAX_NORM * MAX_NORM))

    # the step, and the read: with token steps through the new weights
    b_y = tl.zeros([BD], tl.float32)
    b_q = b_k
    if READS:
        b_q = tl.load(p_q + o_gain + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        b_z, b_h = hidden_units(b_k, p_x, p_w1, p_a1, inside, o_d, o_e, D, E, DEPTH, ACT)
        b_a2 = load_anchor(p_w2, p_a2, inside, o_e, o_d, E, D)
        if KEEPS_ANCHOR:
            store_matrix(new_anchor.last + o_2, b_a2, o_e, o_d, E, D)
            if DEPTH == 2:
                b_a1 = load_anchor(p_w1, p_a1, inside, o_d, o_e, D, E)
                store_matrix(new_anchor.first + o_1, b_a1, o_d, o_e, D, E)
        if DEPTH == 2:
            b_d1 = tl.sum(b_a2 * b_d2[None, :], 1) * activate_derivative(b_z, ACT)
            b_g1 = lr * b_k[:, None] * b_d1[None, :]
            b_w1, b_new1 = stepped(
                b_g1, p_w1, s.first + o_1, init.first + i_init * (D * E),
                new_w.first + o_1, new_s.first + o_1, eta, alpha, o_d, o_e, D, E,
                HAS_MOMENTUM, HAS_INIT,
            )  # fmt: skip
            if READS:
                b_hq = activate(tl.sum(b_q[:, None] * (b_new1 if TOKEN_STEPS else b_w1), 0), ACT)
        elif READS:
            b_hq = tl.load(p_q + o_gain + o_e, mask=o_e < E, other=0.0).to(tl.float32)
        b_g2 = lr * b_h[:, None] * b_d2[None, :]
        b_w2, b_new2 = stepped(
            b_g2, p_w2, s.last + o_2, init.last + i_init * (E * D),
            new_w.last + o_2, new_s.last + o_2, eta, alpha, o_e, o_d, E, D,
            HAS_MOMENTUM, HAS_INIT,
        )  # fmt: skip
        if READS:
            b_y += tl.sum(b_hq[:, None] * (b_new2 if TOKEN_STEPS else b_w2), 0)
    if RESIDUAL_NORM:
        b_w = tl.load(w.gain + o_gain + o_d, mask=m_d, other=0.0)
        b_s = -lr * b_dg
        if HAS_MOMENTUM:
            b_s += eta * tl.load(s.gain + o_gain + o_d, mask=m_d, other=0.0)
        b_new = (1 - alpha) * b_w + b_s
        if HAS_INIT:
            b_new += alpha * tl.load(init.gain + i_init * D + o_d, mask=m_d, other=0.0)
        tl.store(new_w.gain + o_gain + o_d, b_new, mask=m_d)
        tl.store(new_s.gain + o_gain + o_d, b_s, mask=m_d)
        b_normed, _ = layer_norm(b_y[None, :], m_d, D)
        b_y = b_q + (1 + (b_new if TOKEN_STEPS else b_w)) * tl.sum(b_normed, 0)
    if READS:
        tl.store(p_y + o_gain + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d)
    if KEEPS_ANCHOR:
        if i_h == 0:
            tl.store(p_new_position + i_n, (position + 1) % C)


def is_one_token(k: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether :func:`decode_fwd` serves the call."""
    return k.shape[1] == 1 and cu_seqlens is None


def decode_fwd(
    call: MemoryCall, *, keeps: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Computes what ``memory_fwd`` does for one token a row, ``k`` ``[B, 1, H, D]``."""
    k, weights, init, residual_norm = call.k, call.weights, call.init, call.residual_norm
    rows, _, heads, dim = k.shape
    tokens = [dense(x) for x in call.tokens]
    new_weights, new_trace, new_anchor = ([w.new_empty(w.shape) for w in weights] for _ in range(3))
    output = k.new_empty(0 if call.q is None else k.shape)
    surprise = weights[0].new_empty(call.lr.shape)
    offset = k.new_empty(rows if keeps else 0, dtype=torch.int64)
    # the learned initial weights of a module are one for all rows
    shared = bool(init) and all(x.stride(0) == 0 for x in init)
    target = [x[0] for x in init] if shared else init

    def layers(tensors: list[Tensor]) -> Layers:
        first, last, gain = memory_layers(tensors, residual_norm)
        return Layers(first, last, gain)

    states = map(layers, (weights, call.trace, call.anchor or weights, target or weights))
    news = map(layers, (new_weights, new_trace, new_anchor))
    if rows * heads:
        decode_fwd_kernel[(rows * heads,)](
            *(*tokens, *states, dense(call.position), *news, output, surprise, offset),
            call.chunk_size or 1,
            H=heads,
            D=dim,
            E=weights[len(weights) - residual_norm - 1].shape[2],
            BD=power_of_2(dim),
            BE=16 if dim > 64 else 32,
            DEPTH=len(weights) - residual_norm,
            ACT=call.activation,
            RESIDUAL_NORM=residual_norm,
            CLIPS=call.max_grad_norm is not None,
            MAX_NORM=call.max_grad_norm or 0.0,
            TOKEN_STEPS=call.step == "token",
            READS=call.q is not None,
            HAS_MOMENTUM=call.momentum is not None,
            HAS_DECAY=call.decay is not None,
            HAS_INIT=bool(init),
            SHARES_INIT=shared,
            HAS_POSITION=call.position is not None,
            KEEPS_ANCHOR=keeps,
            **launch_options(8),
        )
    return output, surprise, new_weights, new_trace, new_anchor if keeps else [], offset


# --- compiled without a GPU by mal_kernels._triton.aot --------------------------------------------


def _example(
    dim: int, width: int, dtype: torch.dtype = torch.bfloat16, *, depth: int = 2,
    inside: bool = True, residual_norm: bool = False, max_norm: float | None = None,
) -> Callable[[], object]:  # fmt: skip
    def launch() -> object:
        x, gate = meta(32, 1, 4, dim, dtype=dtype), meta(32, 1, 4)
        weights = [meta(32, 4, dim, width), meta(32, 4, width, dim)][-depth:]
        weights += [meta(32, 4, dim)] if residual_norm else []
        anchor, position = (weights, meta(32, dtype=torch.int64)) if inside else ([], None)
        init = [w[:1].expand_as(w) for w in weights]
        states = (weights, weights, anchor, init, position, None)
        options = (64, "token", "gelu", residual_norm, max_norm)
        call = MemoryCall(x, x, x, gate, gate, gate, *states, *options)
        return decode_fwd(call, keeps=True)

    return launch


EXAMPLES = {
    "D64 E256 bf16": _example(64, 256),
    "D64 E128 clipped bf16": _example(64, 128, inside=False, max_norm=1.0),
    "D128 E512 norm bf16": _example(128, 512, residual_norm=True, max_norm=1.0),
    "D64 E256 norm fp32": _example(64, 256, torch.float32, residual_norm=True),
    "depth 1 D256 bf16": _example(256, 256, depth=1),
}
