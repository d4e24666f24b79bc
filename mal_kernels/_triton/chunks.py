"""Where things stand in the kernels of :mod:`.neural_memory`, and what the gates come to.

A row's tokens lie on chunks of ``C`` tokens, its first token ``start`` places into the first one. A
chunk is cut into ``TPC`` tiles of ``BT`` tokens, so tile ``n`` of a row is tile ``n % TPC`` of
chunk ``n // TPC``. The closed form of :mod:`mal_kernels.reference` holds inside a tile as it does
inside a chunk; the chunk decides only at which weights (the anchor) a tile's gradients are taken.

A state is packed into ``P`` floats a head, all layers one behind the other, and numbered: ``N``
initial states, ``N`` final ones, ``N`` anchors given, ``N`` anchors returned, then one for every
tile that is not the first of its row. Tiles of all rows are numbered by slots that need no host
synchronisation, with gaps: row ``i_n`` begins at slot ``begin · TPC // C + i_n · (2 or 2 + TPC)``,
never before the last row ends.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tiles import first_order


@dataclass(frozen=True)
class Static:
    """A ``Static`` is what is known when a kernel is compiled."""

    H: int
    D: int
    E: int  # at depth 1, D
    P: int  # floats of one head's packed state
    DEPTH: int
    ACT: str
    RESIDUAL_NORM: bool
    CLIPS: bool
    MAX_NORM: float
    TOKEN_STEPS: bool
    HAS_MOMENTUM: bool
    HAS_DECAY: bool
    HAS_INIT: bool
    HAS_POSITION: bool
    IS_VARLEN: bool
    KEEPS_ANCHOR: bool
    SAVES_STATES: bool
    READS: bool
    ONE_CHUNK: bool
    BT: int
    BD: int
    BE: int
    LAST: int  # place of the last layer in the packed state
    GAIN: int  # of γ

    def constants(self) -> Static:
        """Returns what a kernel wants: each field a ``tl.constexpr``, plain in the interpreter."""
        if os.environ.get("TRITON_INTERPRET") == "1":
            return self
        return Static(**{f.name: tl.constexpr(getattr(self, f.name)) for f in fields(self)})


class Rows(NamedTuple):
    """``cu_seqlens`` ``[N + 1]``, ``position`` ``[N]``, first chunk gate ``[N]`` of ragged rows."""

    cu_seqlens: Tensor | None
    position: Tensor | None
    gates: Tensor | None


class Tokens(NamedTuple):
    """The arguments of the op, contiguous: ``[B, T, H, D]``, ``[B, T, H]`` or ``[B, NC, H]``."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    decay: Tensor | None


class States(NamedTuple):
    """Packed states ``[·, H, P]`` and decay's target ``[N, H, P]``, all float32."""

    weights: Tensor
    trace: Tensor
    init: Tensor | None


# --- rows, chunks, tiles --------------------------------------------------------------------------


@triton.jit
def row_span(rows, i_n, T, M: tl.constexpr):
    """Returns row ``i_n``'s first token (int64), number of tokens, place in its chunk (int32)."""
    if M.IS_VARLEN:
        begin = tl.load(rows.cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(rows.cu_seqlens + i_n + 1).to(tl.int64) - begin).to(tl.int32)
    else:
        begin = i_n * T
        length = (begin - begin + T).to(tl.int32)  # T may be a constant
    start = length - length
    if M.HAS_POSITION:
        start = tl.load(rows.position + i_n).to(tl.int32)
    return begin, length, start


@triton.jit
def row_tiles(length, start, C, M: tl.constexpr):
    """Tiles of a row, counted from the start of its first chunk."""
    columns = length + start
    return columns // C * tl.cdiv(C, M.BT) + tl.cdiv(columns % C, M.BT)


@triton.jit
def row_chunks(length, start, C):
    """Chunks of a row; 1 when it is empty."""
    return tl.maximum(tl.cdiv(length + start, C), 1)


@triton.jit
def first_slot(begin, i_n, C, M: tl.constexpr):
    """The slot of a row's first tile."""
    per_chunk = tl.cdiv(C, M.BT)
    slack = 2
    if M.HAS_POSITION:
        slack = 2 + per_chunk
    return begin * per_chunk // C + i_n * slack


@triton.jit
def tile_tokens(i_c, i_j, length, start, C, M: tl.constexpr):
    """First token of tile ``i_j`` of chunk ``i_c``, in the row, and which tokens ``[BT]`` exist."""
    i_t = i_c * C + i_j * M.BT - start
    o_s = tl.arange(0, M.BT)
    return i_t, (i_j * M.BT + o_s < C) & (i_t + o_s >= 0) & (i_t + o_s < length)


@triton.jit
def state_index(n, n_tiles, i_n, slot, N, M: tl.constexpr):
    """The state before tile ``n`` of row ``i_n``; the final one where none is saved."""
    index = N + i_n
    if M.SAVES_STATES:
        index = tl.where(n < n_tiles, 4 * N + slot + n, index)
    return tl.where(n == 0, i_n, index)


@triton.jit
def anchor_index(i_c, n_tiles, start, i_n, slot, C, N, M: tl.constexpr):
    """The weights at which chunk ``i_c`` takes its gradients."""
    index = state_index(i_c * tl.cdiv(C, M.BT), n_tiles, i_n, slot, N, M)
    if M.HAS_POSITION:
        index = tl.where((i_c == 0) & (start > 0), 2 * N + i_n, index)
    return index


# --- memory: a scalar int64 place, then 32-bit offsets that all tensors of a tile share -----------


@triton.jit
def tile_offsets(m_t, i_c, BC: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Offsets ``[BT, BC]`` of a tile's tokens in ``[B, T, H, C]`` and which of them exist."""
    o_c = tl.arange(0, BC)
    mask = tl.broadcast_to(m_t[:, None], [M.BT, BC])
    if C % BC != 0:
        mask &= (i_c + o_c < C)[None, :]
    return (tl.arange(0, M.BT) * (M.H * C))[:, None] + o_c[None, :], mask


@triton.jit
def load_tile(p, i_th, m_t, i_c, BC: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Columns from ``i_c`` of a tile ``[BT, BC]`` that begins at token and head ``i_th``."""
    o, mask = tile_offsets(m_t, i_c, BC, C, M)
    return tl.load(p + (i_th * C + i_c) + o, mask=mask, other=0.0)


@triton.jit
def store_tile(p, x, i_th, m_t, i_c, BC: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    o, mask = tile_offsets(m_t, i_c, BC, C, M)
    tl.store(p + (i_th * C + i_c) + o, x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(p, i_th, m_t, M: tl.constexpr):
    """Numbers ``[BT]`` of a tile's tokens, float32, 0 where there is no token."""
    o = tl.arange(0, M.BT) * M.H
    return tl.load(p + i_th + o, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def store_vector(p, x, i_th, m_t, M: tl.constexpr):
    o = tl.arange(0, M.BT) * M.H
    tl.store(p + i_th + o, x.to(p.dtype.element_ty), mask=m_t)


@triton.jit
def part_offsets(
    i_r, i_c, BR: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Offsets ``[BR, BC]`` in a matrix ``[R, C]`` and which exist; all, if parts fit evenly."""
    o_r, o_c = tl.arange(0, BR)[:, None], tl.arange(0, BC)[None, :]
    mask = tl.full([BR, BC], 1, tl.int1)
    if R % BR != 0:
        mask &= i_r + o_r < R
    if C % BC != 0:
        mask &= i_c + o_c < C
    return o_r * C + o_c, mask


@triton.jit
def load_part(
    p, i_r, i_c, BR: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """``[BR, BC]`` of a matrix ``[R, C]`` from row ``i_r`` and column ``i_c``, zero outside."""
    o, mask = part_offsets(i_r, i_c, BR, BC, R, C)
    return tl.load(p + (i_r * C + i_c) + o, mask=mask, other=0.0)


@triton.jit
def store_part(
    p, x, i_r, i_c, BR: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    o, mask = part_offsets(i_r, i_c, BR, BC, R, C)
    tl.store(p + (i_r * C + i_c) + o, x, mask=mask)


# --- gates ----------------------------------------------------------------------------------------


@triton.jit
def token_gates(t, i_th, m_t, M: tl.constexpr):
    """``η`` and ``a = 1 − α`` ``[BT]``; a slot without a token changes nothing: 1 and 1."""
    b_eta = tl.where(m_t, 0.0, 1.0)
    b_a = tl.full([M.BT], 1.0, tl.float32)
    if M.HAS_MOMENTUM:
        b_eta = tl.where(m_t, load_vector(t.momentum, i_th, m_t, M), 1.0)
    if M.HAS_DECAY:
        b_a = 1 - load_vector(t.decay, i_th, m_t, M)
    return b_eta, b_a


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def last_row(t, i_th, m_t, M: tl.constexpr):
    """``w_Cs`` and ``E_Cs`` ``[BT]``, ``β_C``, ``f_C`` and ``ε_C`` of a tile, for its write.

    ``w_Cs = A_Cs + η_{s+1} w_C,s+1`` is a scan backwards; ``A`` and ``E`` are products backwards.
    """
    o_s = tl.arange(0, M.BT)
    b_eta, b_a = token_gates(t, i_th, m_t, M)
    b_later_eta, b_later_a = token_gates(t, i_th + M.H, shifted(m_t, 1, M.BT), M)
    b_decays = tl.cumprod(b_later_a, 0, reverse=True)  # A_Cs
    b_momenta = tl.cumprod(b_later_eta, 0, reverse=True)  # E_Cs
    b_decays = tl.where(m_t, b_decays, 0.0)
    b_w = tl.associative_scan((b_later_eta, b_decays), 0, first_order, reverse=True)[1]
    b_e0 = tl.cumprod(b_eta, 0)
    e0 = tl.sum(tl.where(o_s == M.BT - 1, b_e0, 0.0), 0)
    return b_w, b_momenta, tl.reduce(b_a, 0, multiply), tl.sum(b_decays * b_e0, 0), e0


@triton.jit
def shifted(m_t, BY: tl.constexpr, BT: tl.constexpr):
    """``m_{t+BY}``: whether BY slots later is a token of the tile, which is a run of slots."""
    o_s = tl.arange(0, BT)
    first = tl.min(tl.where(m_t, o_s, BT), 0)
    last = tl.max(tl.where(m_t, o_s, -1), 0)
    return (o_s + BY >= first) & (o_s + BY <= last)


@triton.jit
def recursions(b_eta, b_a, m_t, LAG: tl.constexpr, M: tl.constexpr):
    """``w`` and ``E`` ``[BT, BT]``, ``β``, ``f`` and ``ε`` ``[BT]`` of a tile from gates ``[BT]``.

    ``E_t = η_t E_{t−1}`` and ``w_t = a_t w_{t−1} + E_t`` row by row, from ``E_ss = 1``. With ``LAG
    = 1`` the gates and mask are those of the token before, and row t of every result is row t − 1.
    """
    o_s = tl.arange(0, M.BT)
    below = o_s[:, None] > o_s[None, :] + LAG
    diagonal = o_s[:, None] == o_s[None, :] + LAG
    b_e = tl.where(diagonal, 1.0, 0.0)
    if M.HAS_MOMENTUM:
        b_e = tl.cumprod(tl.where(below, b_eta[:, None], 1.0), 0)
        b_e = tl.where(below | diagonal, b_e, 0.0)
    b_columns = tl.broadcast_to(b_a[:, None], [M.BT, M.BT])
    b_added = tl.where(m_t[:, None], b_e, 0.0)
    b_w = tl.associative_scan((b_columns, b_added), 0, first_order)[1]
    b_e0 = tl.cumprod(b_eta, 0)
    b_f = tl.associative_scan((b_a, tl.where(m_t, b_e0, 0.0)), 0, first_order)[1]
    return b_w, b_e, tl.cumprod(b_a, 0), b_f, b_e0


@triton.jit
def chunk_gates(t, rows, i_n, i_c, i_h, NC, M: tl.constexpr):
    """``η`` and ``1 − α`` of a chunk step, scalars."""
    gate = i_n * NC
    if rows.gates is not None:
        gate = tl.load(rows.gates + i_n)
    o_ch = (gate + i_c) * M.H + i_h
    eta, a = 0.0, 1.0
    if M.HAS_MOMENTUM:
        eta = tl.load(t.momentum + o_ch).to(tl.float32)
    if M.HAS_DECAY:
        a = 1 - tl.load(t.decay + o_ch).to(tl.float32)
    return eta, a
