"""From host hidden states to host hidden states in three launches, and the gradients in five more.

Computes :func:`mal_kernels.reference.aligned_residual_read`. Forward, for the ``T`` tokens named::

    project   z_q, z_g = x̂ ⊙ norm · (W_q, W_gate)ᵀ, x̂ = x / rms(x)       tile of tokens × head
    read      a = M(z_q / ‖z_q‖; W) ⊙ silu(z_g)                          tile of tokens × head
    add       hidden[token] += a W_outᵀ                                  tile of tokens × tile of Dm

A tile of tokens may name several states: the program reads each of them and keeps the tokens that
are its own, so tokens need no sorting; sorted ones cost nothing extra. Backward recomputes
``project``, then ``tokens`` (everything up to z_q and z_g), the weights' kernel of the plain read,
``hidden`` and ``params``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import AlignedCall
from ..errors import ArgumentError
from .autotune import configurations, fastest
from .memory_read import layers, memory_read_bwd_w_kernel
from .tiles import (
    activate,
    activate_derivative,
    dot,
    launch_options,
    launch_options_of,
    layer_norm,
    layer_norm_bwd,
    load_matrix,
    load_rows,
    meta,
    network,
    power_of_2,
    store_matrix,
    store_rows,
    tile_sizes,
)

# --- forward --------------------------------------------------------------------------------------


@triton.jit
def load_tokens(p_token, i_tile, T, W: tl.constexpr, BT: tl.constexpr):
    """Tile of the tokens' places ``0 … T − 1``, their mask, and where their rows of ``W`` begin."""
    o_t = i_tile * BT + tl.arange(0, BT).to(tl.int64)
    m_t = o_t < T
    return o_t, m_t, tl.load(p_token + o_t, mask=m_t, other=0) * W


@triton.jit(do_not_specialize=["T"])
def aligned_project_kernel(
    p_hidden, p_token, p_norm, p_wq, p_wg, p_zq, p_zg, p_rms, T,
    W: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """``z_q`` and ``z_g`` of one head, float32 ``[T, H, D]``; head 0 also stores ``1 / rms(x)``.

    Grid (tiles of BT tokens, H). The row is read twice, so that what is rounded is the normed row.
    """
    o_t, m_t, o_x = load_tokens(p_token, tl.program_id(0), T, W, BT)
    i_h = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_square = tl.zeros([BT], tl.float32)
    for i_w in range(0, W, BW):
        b_x = load_rows(p_hidden, o_x, m_t, i_w + tl.arange(0, BW), W).to(tl.float32)
        b_square += tl.sum(b_x * b_x, 1)
    b_rms = tl.rsqrt(b_square / W + 1e-6)
    b_zq = tl.zeros([BT, BD], tl.float32)
    b_zg = tl.zeros([BT, BD], tl.float32)
    for i_w in range(0, W, BW):
        o_w = i_w + tl.arange(0, BW).to(tl.int64)
        b_x = load_rows(p_hidden, o_x, m_t, o_w, W)  # [BT, BW]
        b_norm = tl.load(p_norm + o_w, mask=o_w < W, other=0.0).to(tl.float32)
        b_x = (b_x.to(tl.float32) * b_rms[:, None] * b_norm[None, :]).to(b_x.dtype)
        b_zq = dot(b_x, tl.trans(load_matrix(p_wq + i_h * (D * W), o_d, o_w, D, W)), b_zq)
        b_zg = dot(b_x, tl.trans(load_matrix(p_wg + i_h * (D * W), o_d, o_w, D, W)), b_zg)
    store_rows(p_zq, b_zq, (o_t * H + i_h) * D, m_t, o_d, D)
    store_rows(p_zg, b_zg, (o_t * H + i_h) * D, m_t, o_d, D)
    if i_h == 0:
        tl.store(p_rms + o_t, b_rms, mask=m_t)


@triton.jit
def states_of(p_state, o_t, m_t):
    """The state of every token of a tile, and the first and last of them."""
    b_state = tl.load(p_state + o_t, mask=m_t, other=-1)
    return b_state, tl.min(tl.where(m_t, b_state, 2**31), 0), tl.max(b_state, 0)


@triton.jit
def inverse_length(x):
    """``1 / ‖x‖`` of every row, as ``torch.nn.functional.normalize``."""
    return 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)


@triton.jit(do_not_specialize=["T"])
def aligned_read_kernel(
    p_zq, p_zg, p_state, p_w1, p_w2, p_gain, p_a, T,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DEPTH: tl.constexpr, ACT: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
):  # fmt: skip
    """``a = M(q; W) ⊙ silu(z_g)`` ``[T, H, D]``, each token at its own state. Grid (tiles, H)."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i_h, m_t, o_d = tl.program_id(1).to(tl.int64), o_t < T, tl.arange(0, BD)
    o_row = (o_t * H + i_h) * D
    b_zq = load_rows(p_zq, o_row, m_t, o_d, D)  # [BT, BD]
    b_scale = inverse_length(b_zq)
    b_q = (b_zq * b_scale[:, None]).to(p_a.dtype.element_ty)
    b_y = tl.zeros([BT, BD], tl.float32)
    b_state, first, last = states_of(p_state, o_t, m_t)
    for i_n in range(first, last + 1):
        m_n = b_state == i_n
        if tl.max(m_n.to(tl.int32), 0) > 0:
            i_nh = i_n * H + i_h
            b_o = network(
                b_q, p_zq, o_row, m_t, b_scale, p_w1 + i_nh * (D * E), p_w2 + i_nh * (E * D),
                D, E, BD, BE, DEPTH, ACT,
            )  # fmt: skip
            if RESIDUAL_NORM:
                b_gain = 1 + tl.load(p_gain + i_nh * D + o_d, mask=o_d < D, other=0.0)
                b_o = b_zq * b_scale[:, None] + b_gain[None, :] * layer_norm(b_o, o_d < D, D)[0]
            b_y = tl.where(m_n[:, None], b_o, b_y)
    b_zg = load_rows(p_zg, o_row, m_t, o_d, D)
    store_rows(p_a, b_y * activate(b_zg, "silu"), o_row, m_t, o_d, D)


@triton.jit(do_not_specialize=["T"])
def aligned_add_kernel(
    p_hidden, p_a, p_token, p_wo, p_out, T,
    W: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """``out[token] = hidden[token] + a W_outᵀ``, ``K = H·D``. Grid (tiles of BT tokens, of BW)."""
    o_t, m_t, o_x = load_tokens(p_token, tl.program_id(0), T, W, BT)
    o_w = tl.program_id(1).to(tl.int64) * BW + tl.arange(0, BW)
    b_out = load_rows(p_hidden, o_x, m_t, o_w, W).to(tl.float32)  # [BT, BW]
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK).to(tl.int64)
        b_a = load_rows(p_a, o_t * K, m_t, o_k, K)
        b_out = dot(b_a, tl.trans(load_matrix(p_wo, o_w, o_k, W, K)), b_out)
    store_rows(p_out, b_out, o_x, m_t, o_w, W)


# --- backward -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def aligned_bwd_tokens_kernel(
    p_dout, p_token, p_wo, p_zq, p_zg, p_state, p_w1, p_w2, p_gain,
    p_q, p_a, p_dzq, p_dzg, p_do, p_dgain, T,
    W: tl.constexpr, H: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr,
    DEPTH: tl.constexpr, ACT: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
):  # fmt: skip
    """From ``d hidden`` to ``dz_q`` and ``dz_g``; keeps ``q``, ``a``, ``do`` and ``dγ``.

    ``da = d hidden W_out``, then through gate and memory; ``dz_q = (dq − q ⟨q, dq⟩) / ‖z_q‖``.
    Grid (tiles of BT tokens, H).
    """
    o_t, m_t, o_x = load_tokens(p_token, tl.program_id(0), T, W, BT)
    i_h, o_d = tl.program_id(1).to(tl.int64), tl.arange(0, BD)
    o_row = (o_t * H + i_h) * D
    b_dy = tl.zeros([BT, BD], tl.float32)
    for i_w in range(0, W, BW):
        o_w = i_w + tl.arange(0, BW)
        b_wo = load_rows(p_wo, (o_w.to(tl.int64) * H + i_h) * D, o_w < W, o_d, D)  # [BW, BD]
        b_dy = dot(load_rows(p_dout, o_x, m_t, o_w, W), b_wo, b_dy)
    b_zg = load_rows(p_zg, o_row, m_t, o_d, D)
    b_dzg = b_dy * activate_derivative(b_zg, "silu")
    b_dy *= activate(b_zg, "silu")
    b_zq = load_rows(p_zq, o_row, m_t, o_d, D)
    b_scale = inverse_length(b_zq)
    b_zq *= b_scale[:, None]
    b_q = b_zq.to(p_q.dtype.element_ty)
    b_y = tl.zeros([BT, BD], tl.float32)
    b_dq = tl.zeros([BT, BD], tl.float32)
    b_state, first, last = states_of(p_state, o_t, m_t)
    for i_n in range(first, last + 1):
        m_n = b_state == i_n
        if tl.max(m_n.to(tl.int32), 0) > 0:
            i_nh = i_n * H + i_h
            p_w1n, p_w2n = p_w1 + i_nh * (D * E), p_w2 + i_nh * (E * D)
            b_o = network(
                b_q, p_zq, o_row, m_t, b_scale, p_w1n, p_w2n, D, E, BD, BE, DEPTH, ACT
            )  # fmt: skip
            b_do = tl.where(m_n[:, None], b_dy, 0.0)
            if RESIDUAL_NORM:
                b_normed, b_std = layer_norm(b_o, o_d < D, D)
                b_gain = 1 + tl.load(p_gain + i_nh * D + o_d, mask=o_d < D, other=0.0)
                b_o = b_zq + b_gain[None, :] * b_normed
                store_rows(p_dgain, b_do * b_normed, o_row, m_n, o_d, D)
                b_dq += b_do
                b_do = layer_norm_bwd(b_do * b_gain[None, :], b_normed, b_std, o_d < D, D)
            b_y = tl.where(m_n[:, None], b_o, b_y)
            store_rows(p_do, b_do, o_row, m_n, o_d, D)
            tl.debug_barrier()  # what one thread stored, another loads
            for i_e in range(0, E, BE):
                o_e = i_e + tl.arange(0, BE)
                if DEPTH == 2:
                    b_dh = dot(b_do.to(b_q.dtype), tl.trans(load_matrix(p_w2n, o_e, o_d, E, D)))
                    b_w1 = load_matrix(p_w1n, o_d, o_e, D, E)
                    b_dz = b_dh * activate_derivative(dot(b_q, b_w1), ACT)
                    b_dq = dot(b_dz.to(b_q.dtype), tl.trans(b_w1), b_dq)
                else:  # slices of the other side, so that dq is a sum; E = D
                    b_part = load_rows(p_do, o_row, m_n, o_e, D)
                    b_dq = dot(b_part, tl.trans(load_matrix(p_w2n, o_d, o_e, E, D)), b_dq)
    b_dzq = (b_dq - b_zq * tl.sum(b_zq * b_dq, 1)[:, None]) * b_scale[:, None]
    store_rows(p_q, b_q, o_row, m_t, o_d, D)
    store_rows(p_a, b_y * activate(b_zg, "silu"), o_row, m_t, o_d, D)
    store_rows(p_dzq, b_dzq, o_row, m_t, o_d, D)
    store_rows(p_dzg, b_dzg * b_y, o_row, m_t, o_d, D)


@triton.jit(do_not_specialize=["T"])
def aligned_bwd_hidden_kernel(
    p_dout, p_hidden, p_token, p_norm, p_rms, p_wq, p_wg, p_zg, p_dzq, p_dzg, p_dhidden, T,
    W: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """``d hidden[token] += (dx̂ − x̂ ⟨x̂, dx̂⟩ / Dm) / rms``.

    ``dx̂ = norm ⊙ (dz_q W_q + dz_g W_gate)``. ``⟨x̂, dx̂⟩ = ⟨z_q, dz_q⟩ + ⟨z_g, dz_g⟩``, and the
    first of the two is 0: the length of z_q does not matter. So a row's sum needs no pass over Dm.
    Grid (tiles of BT tokens, of BW features).
    """
    o_t, m_t, o_x = load_tokens(p_token, tl.program_id(0), T, W, BT)
    o_w = tl.program_id(1).to(tl.int64) * BW + tl.arange(0, BW)
    b_dx = tl.zeros([BT, BW], tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    dtype = p_hidden.dtype.element_ty
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK).to(tl.int64)
        b_dzq = load_rows(p_dzq, o_t * K, m_t, o_k, K)  # [BT, BK]
        b_dzg = load_rows(p_dzg, o_t * K, m_t, o_k, K)
        b_sum += tl.sum(b_dzg * load_rows(p_zg, o_t * K, m_t, o_k, K), 1)
        b_dx = dot(b_dzq.to(dtype), load_matrix(p_wq, o_k, o_w, K, W), b_dx)
        b_dx = dot(b_dzg.to(dtype), load_matrix(p_wg, o_k, o_w, K, W), b_dx)
    b_rms = tl.load(p_rms + o_t, mask=m_t, other=0.0)
    b_norm = tl.load(p_norm + o_w, mask=o_w < W, other=0.0).to(tl.float32)
    b_x = load_rows(p_hidden, o_x, m_t, o_w, W).to(tl.float32) * b_rms[:, None]
    b_dx = b_dx * b_norm[None, :] - b_x * (b_sum / W)[:, None]
    b_dout = load_rows(p_dout, o_x, m_t, o_w, W).to(tl.float32)
    store_rows(p_dhidden, b_dout + b_dx * b_rms[:, None], o_x, m_t, o_w, W)


@triton.jit(do_not_specialize=["T"])
def aligned_bwd_params_kernel(
    p_dout, p_hidden, p_token, p_norm, p_rms, p_wq, p_wg, p_a, p_dzq, p_dzg,
    p_dnorm, p_dwq, p_dwg, p_dwo, T,
    W: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """``dW_q = G_q ⊙ norm`` with ``G_q = dz_qᵀ x̂``, ``dW_gate`` alike with ``G_g``.

    ``d norm = Σ_k W_q ⊙ G_q + W_gate ⊙ G_g`` and ``dW_out = d hiddenᵀ a``. Grid (tiles of BK of the
    ``K = H·D`` rows, of BW features); each walks all tokens. ``d norm`` is a partial sum, one for
    each tile of K.
    """
    i_k = tl.program_id(0)
    o_w = tl.program_id(1).to(tl.int64) * BW + tl.arange(0, BW)
    o_k = i_k.to(tl.int64) * BK + tl.arange(0, BK)
    b_gq = tl.zeros([BK, BW], tl.float32)
    b_gg = tl.zeros([BK, BW], tl.float32)
    b_dwo = tl.zeros([BW, BK], tl.float32)
    for i_t in range(0, tl.cdiv(T, BT)):
        o_t, m_t, o_x = load_tokens(p_token, i_t, T, W, BT)
        b_x = load_rows(p_hidden, o_x, m_t, o_w, W)  # [BT, BW]
        b_rms = tl.load(p_rms + o_t, mask=m_t, other=0.0)
        b_x = (b_x.to(tl.float32) * b_rms[:, None]).to(b_x.dtype)
        b_dzq = load_rows(p_dzq, o_t * K, m_t, o_k, K).to(b_x.dtype)  # [BT, BK]
        b_dzg = load_rows(p_dzg, o_t * K, m_t, o_k, K).to(b_x.dtype)
        b_gq = dot(tl.trans(b_dzq), b_x, b_gq)
        b_gg = dot(tl.trans(b_dzg), b_x, b_gg)
        b_dout = load_rows(p_dout, o_x, m_t, o_w, W)
        b_dwo = dot(tl.trans(b_dout), load_rows(p_a, o_t * K, m_t, o_k, K), b_dwo)
    b_wq, b_wg = load_matrix(p_wq, o_k, o_w, K, W), load_matrix(p_wg, o_k, o_w, K, W)
    b_dnorm = tl.sum(b_wq.to(tl.float32) * b_gq + b_wg.to(tl.float32) * b_gg, 0)
    tl.store(p_dnorm + i_k.to(tl.int64) * W + o_w, b_dnorm, mask=o_w < W)
    b_norm = tl.load(p_norm + o_w, mask=o_w < W, other=0.0).to(tl.float32)
    store_matrix(p_dwq, b_gq * b_norm[None, :], o_k, o_w, K, W)
    store_matrix(p_dwg, b_gg * b_norm[None, :], o_k, o_w, K, W)
    store_matrix(p_dwo, b_dwo, o_w, o_k, W, K)


# --- launchers ------------------------------------------------------------------------------------


def aligned_fwd(call: AlignedCall, *, in_place: bool = False) -> Tensor:
    """``hidden`` ``[B, S, Dm]`` with the residual added at ``token_index``.

    A new tensor, the other rows copied; ``in_place``, for inference, writes a contiguous ``hidden``
    itself.
    """
    if in_place and not call.hidden.is_contiguous():
        raise ArgumentError("hidden: got a strided tensor, expected a contiguous one for in_place")
    hidden, token_index, state_index, params = _contiguous(call)
    tokens = token_index.shape[0]
    w1, w2, gain = layers(call.weights, call.residual_norm)
    memory, matrix = _static(call)

    def launch(static: dict[str, Any], out: Tensor | None = None) -> Tensor:
        out = hidden.clone() if out is None else out
        same = dict(BT=static["BT"], **launch_options_of(static))
        z_q, z_g, _ = _project(hidden, token_index, params, static)
        a = hidden.new_empty(z_q.shape)
        aligned_read_kernel[(triton.cdiv(tokens, static["BT"]), static["H"])](
            z_q, z_g, state_index, w1, w2, gain, a, tokens, **static
        )
        aligned_add_kernel[_grid(tokens, matrix | same)](
            hidden, a, token_index, params[3], out, tokens, **(matrix | same)
        )
        return out

    return launch(
        fastest(hidden, configurations(memory, hidden.dtype), launch), hidden if in_place else None
    )


def aligned_bwd(d_output: Tensor, call: AlignedCall) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of ``hidden``, of every tensor of ``weights`` and of ``params``."""
    hidden, token_index, state_index, params = _contiguous(call)
    d_output, tokens = d_output.contiguous(), token_index.shape[0]
    norm, w_q, w_gate, w_out = params
    weights, residual_norm = call.weights, call.residual_norm
    w1, w2, gain = layers(weights, residual_norm)
    memory, matrix = _static(call)
    # more is alive at once than in forward
    tile = 32 if memory["D"] <= 64 and hidden.itemsize == 2 else 16
    for static in (memory, matrix):
        static.update(BT=min(tile, static["BT"]), **launch_options(8, num_stages=2))
    z_q, z_g, rms = _project(hidden, token_index, params, memory)
    heads = memory["H"]

    q, a, d_o = (hidden.new_empty(z_q.shape) for _ in range(3))
    d_zq, d_zg = (z_q.new_empty(z_q.shape) for _ in range(2))
    d_gain = z_q.new_empty(z_q.shape) if residual_norm else None
    aligned_bwd_tokens_kernel[(triton.cdiv(tokens, memory["BT"]), heads)](
        *(d_output, token_index, w_out, z_q, z_g, state_index, w1, w2, gain),
        *(q, a, d_zq, d_zg, d_o, d_gain, tokens),
        W=matrix["W"],
        BW=matrix["BW"],
        **memory,
    )
    d_weights = [w.new_empty(w.shape) for w in weights]
    d_w1, d_w2, d_gamma = layers(d_weights, residual_norm)
    slices = triton.cdiv(memory["E"], memory["BE"])
    memory_read_bwd_w_kernel[(slices, heads, weights[0].shape[0])](
        *(d_o, d_gain, q, w1, w2, None, state_index, d_w1, d_w2, d_gamma, tokens),
        IS_VARLEN=False,
        IS_INDEXED=True,
        **memory,
    )
    d_hidden = d_output.clone()
    aligned_bwd_hidden_kernel[_grid(tokens, matrix)](
        *(d_output, hidden, token_index, norm, rms, w_q, w_gate),
        *(z_g, d_zq, d_zg, d_hidden, tokens),
        **matrix,
    )
    d_wq, d_wg, d_wo = (x.new_empty(x.shape) for x in (w_q, w_gate, w_out))
    blocks = triton.cdiv(matrix["K"], matrix["BK"])
    d_norm = norm.new_empty(blocks, *norm.shape, dtype=torch.float32)
    aligned_bwd_params_kernel[(blocks, triton.cdiv(matrix["W"], matrix["BW"]))](
        *(d_output, hidden, token_index, norm, rms, w_q, w_gate),
        *(a, d_zq, d_zg, d_norm, d_wq, d_wg, d_wo, tokens),
        **matrix,
    )
    return d_hidden, d_weights, [d_norm.sum(0).to(norm.dtype), d_wq, d_wg, d_wo]


def _project(
    hidden: Tensor, token_index: Tensor, params: list[Tensor], memory: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """``z_q`` and ``z_g`` ``[T, H, D]`` and ``1 / rms(x)`` ``[T]``, float32."""
    tokens, heads, dim = token_index.shape[0], memory["H"], memory["D"]
    z_q, z_g = (
        hidden.new_empty(tokens, heads, dim, dtype=torch.float32) for _ in range(2)
    )  # fmt: skip
    rms = hidden.new_empty(tokens, dtype=torch.float32)
    same = {name: memory[name] for name in ("H", "D", "BT", "BD")} | launch_options_of(memory)
    aligned_project_kernel[(triton.cdiv(tokens, memory["BT"]), heads)](
        *(hidden, token_index, *params[:3], z_q, z_g, rms, tokens),
        W=hidden.shape[-1],
        BW=64 if hidden.itemsize == 2 else 32,  # wider, float32 spills
        **same,
    )
    return z_q, z_g, rms


def _contiguous(call: AlignedCall) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """``hidden``, the two indices and ``params``, without strides."""
    tensors = (call.hidden, call.token_index, call.state_index)
    return *(x.contiguous() for x in tensors), [x.contiguous() for x in call.params]


def _static(call: AlignedCall) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of the kernels of the memory, and of the others."""
    hidden, weights, tokens = call.hidden, call.weights, call.token_index.shape[0]
    depth, heads, dim = len(weights) - call.residual_norm, *weights[0].shape[1:3]
    sizes = tile_sizes(tokens, dim, hidden.dtype)
    if hidden.itemsize == 4:
        sizes.update(BT=16, **launch_options(8, num_stages=2))
    memory = dict(
        H=heads,
        D=dim,
        E=weights[0].shape[3],
        DEPTH=depth,
        ACT=call.activation,
        RESIDUAL_NORM=call.residual_norm,
        **sizes,
    )
    inner = heads * dim
    matrix = dict(W=hidden.shape[-1], K=inner, BK=min(64, power_of_2(inner)), BW=64)
    same = dict(BT=sizes["BT"], **launch_options_of(sizes))
    return memory, matrix | same


def _grid(tokens: int, matrix: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(tokens, matrix["BT"]), triton.cdiv(matrix["W"], matrix["BW"])


def _example(
    width: int, dim: int, hidden: int, tokens: int, dtype: torch.dtype, *, depth: int = 2,
    residual_norm: bool = False,
) -> Callable[[], object]:  # fmt: skip
    def launch() -> object:
        x, index = meta(2, 2 * tokens, width, dtype=dtype), meta(tokens, dtype=torch.int64)
        weights = [meta(2, 4, dim, hidden), meta(2, 4, hidden, dim)][-depth:]
        weights += [meta(2, 4, dim)] if residual_norm else []
        inner = 4 * dim
        params = [meta(width), meta(inner, width), meta(inner, width), meta(width, inner)]
        call = AlignedCall(x, index, index, weights, params, "gelu", residual_norm)
        return aligned_fwd(call), aligned_bwd(x, call)

    return launch


EXAMPLES = {
    "Dm4096 D64 E128 bf16 turn": _example(4096, 64, 128, 112, torch.bfloat16),
    "Dm3584 D64 E256 bf16 norm": _example(3584, 64, 256, 1500, torch.bfloat16, residual_norm=True),
    "Dm4096 D128 E512 fp16": _example(4096, 128, 512, 1500, torch.float16),
    "Dm1024 D128 depth 1 bf16": _example(1024, 128, 128, 1500, torch.bfloat16, depth=1),
    "Dm1024 D64 E128 fp32": _example(1024, 64, 128, 1500, torch.float32),
}
