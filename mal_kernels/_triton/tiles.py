"""Kernels share activations, LayerNorm, tiles of ragged rows and the memory network."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- on the host ----------------------------------------------------------------------------------


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of two ≥ ``n`` and ``least``; 16 is the least side of a ``tl.dot``."""
    return max(least, triton.next_power_of_2(n))


def tile_sizes(tokens: int, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles and launch options for memories of ``dim`` features: one choice per size, none spills.

    A turn of few tokens is spread over more programs. Which is fastest only a GPU can tell; a fixed
    rule is reproducible, costs nothing at first use and suits CUDA graphs.
    """
    wide, half = dim > 64, dtype.itemsize == 2
    most = 64 if half else 16 if wide else 32
    return dict(
        BT=16 if tokens <= 256 else most,
        BD=power_of_2(dim),
        BE=32 if not wide else 64 if half else 16,
        **launch_options(8 if wide else 4, num_stages=1 if wide else 2),
    )


def launch_options(num_warps: int, **others: int) -> dict[str, int]:
    """Options of a launch, with which ``a * b + c`` is one instruction whatever the default is."""
    return dict(num_warps=num_warps, enable_fp_fusion=True, **others)


def launch_options_of(static: dict[str, Any]) -> dict[str, Any]:
    """The launch options among all that a kernel is given."""
    return {name: static[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}


def dense(x: Tensor | None) -> Tensor | None:
    """``x`` without strides, for kernels know none; None stays None."""
    return None if x is None else x.contiguous()


def rows_and_tiles(x: Tensor, cu_seqlens: Tensor | None, tile: int) -> tuple[int, int]:
    """Rows of ``x`` ``[B, T, ...]`` and an upper bound of their tiles that needs no host sync."""
    batch, tokens = x.shape[:2]
    if cu_seqlens is None:
        return batch, batch * triton.cdiv(tokens, tile)
    rows = cu_seqlens.shape[0] - 1
    return rows, triton.cdiv(tokens, tile) + rows


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, for ``EXAMPLES``."""
    return torch.empty(shape, dtype=dtype, device="meta")


# --- arithmetic -----------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc=None):
    """``a b + acc`` in float32, ``b`` rounded to the dtype of ``a``; float32 stays exact.

    A float32 product holds whole rows of ``a`` and columns of ``b`` in a thread's registers, so it
    is taken in pieces of 32 along the inner dimension, which are then summed.
    """
    PIECES: tl.constexpr = a.shape[1] // 32 if a.dtype == tl.float32 else 1
    if PIECES > 1:
        a = tl.permute(tl.reshape(a, [a.shape[0], PIECES, 32]), (1, 0, 2))
        b = tl.reshape(b.to(tl.float32), [PIECES, 32, b.shape[1]])
        product = tl.sum(tl.dot(a, b, input_precision="ieee"), 0)
        if acc is not None:
            product += acc
    else:
        product = tl.dot(a, b.to(a.dtype), acc=acc, input_precision="ieee")
    return product


@triton.jit
def activate(z, ACT: tl.constexpr):
    """Applies one of :data:`mal_kernels.network.ACTIVATIONS`."""
    if ACT == "gelu":
        h = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        h = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == "silu":
        h = z * tl.sigmoid(z)
    else:
        h = tl.maximum(z, 0.0)
    return h


@triton.jit
def activate_derivative(z, ACT: tl.constexpr):
    if ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        d = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        d = s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        d = s * (1 + z * (1 - s))
    else:
        d = (z > 0).to(z.dtype)
    return d


@triton.jit
def activate_second_derivative(z, ACT: tl.constexpr):
    if ACT == "gelu":
        d = 0.3989422804014327 * tl.exp(-0.5 * z * z) * (2 - z * z)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        inner = 1.5957691216057308 * (1 + 0.134145 * z * z)
        curve = z * (0.42812889763560147 * z + (1 - 2 * s) * inner * inner)
        d = s * (1 - s) * (2 * inner + curve)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        d = s * (1 - s) * (2 + z * (1 - 2 * s))
    else:
        d = tl.zeros_like(z)
    return d


@triton.jit
def layer_norm(x, m_d, D: tl.constexpr):
    """Rows of ``x`` ``[BT, BD]`` without mean and scaled to variance 1; and the scale ``[BT]``."""
    centred = tl.where(m_d[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + 1e-5)
    return centred * scale[:, None], scale


@triton.jit
def layer_norm_bwd(d, normed, scale, m_d, D: tl.constexpr):
    """Gradient before :func:`layer_norm` from ``d`` behind it, zero in the padding."""
    mean = tl.sum(d, 1) / D
    projected = tl.sum(d * normed, 1) / D
    return (
        tl.where(m_d[None, :], (d - mean[:, None] - normed * projected[:, None]), 0.0)
        * (scale[:, None])
    )


@triton.jit
def first_order(gate_l, x_l, gate_r, x_r):
    """Composition of ``y ↦ gate y + x``: the combine function of every scan."""
    return gate_l * gate_r, gate_r * x_l + x_r


# --- memory ---------------------------------------------------------------------------------------


@triton.jit
def load_matrix(p, o_r, o_c, R: tl.constexpr, C: tl.constexpr):
    """Rows ``o_r`` and columns ``o_c`` of a row-major ``R × C`` matrix, zero outside."""
    mask = (o_r < R)[:, None] & (o_c < C)[None, :]
    return tl.load(p + o_r[:, None] * C + o_c[None, :], mask=mask, other=0.0)


@triton.jit
def store_matrix(p, x, o_r, o_c, R: tl.constexpr, C: tl.constexpr):
    mask = (o_r < R)[:, None] & (o_c < C)[None, :]
    tl.store(p + o_r[:, None] * C + o_c[None, :], x, mask=mask)


@triton.jit
def load_rows(p, o_row, m_row, o_c, C: tl.constexpr):
    """Columns ``o_c`` of rows that begin ``o_row`` (int64) elements after ``p``, zero outside."""
    mask = m_row[:, None] & (o_c < C)[None, :]
    return tl.load(p + o_row[:, None] + o_c[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(p, x, o_row, m_row, o_c, C: tl.constexpr):
    mask = m_row[:, None] & (o_c < C)[None, :]
    tl.store(p + o_row[:, None] + o_c[None, :], x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def row_bounds(i_n, p_cu, T, IS_VARLEN: tl.constexpr):
    """First token of row ``i_n`` and of the next, int64, counted over the whole batch."""
    i_n = i_n.to(tl.int64)
    if IS_VARLEN:
        begin = tl.load(p_cu + i_n).to(tl.int64)
        end = tl.load(p_cu + i_n + 1).to(tl.int64)
    else:
        begin = i_n * T
        end = begin + T
    return begin, end


@triton.jit
def tile_of(i_tile, p_cu, T, N, BT: tl.constexpr, BN: tl.constexpr, IS_VARLEN: tl.constexpr):
    """Row of tile ``i_tile``, its tokens ``[BT]`` and their mask; tiles past the last are empty."""
    if IS_VARLEN:
        o_n = tl.arange(0, BN)
        b_begin = tl.load(p_cu + o_n.to(tl.int64), mask=o_n < N, other=0)
        b_end = tl.load(p_cu + (o_n.to(tl.int64) + 1), mask=o_n < N, other=0)
        b_tiles = ((b_end - b_begin + BT - 1) // BT).to(tl.int32)
        i_n = tl.sum((tl.cumsum(b_tiles, 0) <= i_tile).to(tl.int32), 0)
        i_n = tl.minimum(i_n, N - 1)
        i_local = i_tile - tl.sum(tl.where(o_n < i_n, b_tiles, 0), 0)
    else:
        i_n = i_tile // tl.cdiv(T, BT)
        i_local = i_tile % tl.cdiv(T, BT)
    begin, end = row_bounds(i_n, p_cu, T, IS_VARLEN)
    o_t = begin + i_local.to(tl.int64) * BT + tl.arange(0, BT)
    return i_n.to(tl.int64), o_t, o_t < end


# --- the memory network: one head, the hidden width E in slices of BE -----------------------------


@triton.jit
def hidden_slice(
    b_q, p_q, o_row, m_row, b_scale, p_w1, i_e,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Slice ``i_e`` of ``q W1``, at depth 1 of ``q``: what the last layer gets, not yet activated.

    ``b_q`` ``[BT, BD]`` holds ``b_scale · q``; the slice of depth 1 is read from memory again.
    """
    o_e = i_e + tl.arange(0, BE)
    if DEPTH == 1:
        b_z = load_rows(p_q, o_row, m_row, o_e, D).to(tl.float32) * b_scale[:, None]
    else:
        b_z = dot(b_q, load_matrix(p_w1, tl.arange(0, BD), o_e, D, E))
    return b_z


@triton.jit
def network(
    b_q, p_q, o_row, m_row, b_scale, p_w1, p_w2,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DEPTH: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """``act(q W1) W2`` (at depth 1 ``q W2``), float32 ``[BT, BD]``."""
    b_o = tl.zeros([b_q.shape[0], BD], tl.float32)
    for i_e in range(0, E, BE):
        b_h = hidden_slice(b_q, p_q, o_row, m_row, b_scale, p_w1, i_e, D, E, BD, BE, DEPTH)
        if DEPTH == 2:
            b_h = activate(b_h, ACT)
        o_e = i_e + tl.arange(0, BE)
        b_o = dot(b_h.to(b_q.dtype), load_matrix(p_w2, o_e, tl.arange(0, BD), E, D), b_o)
    return b_o
