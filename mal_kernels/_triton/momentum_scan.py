"""``S_t = η_t S_{t−1} + u_t``, ``W_t = (1 − α_t) W_{t−1} + S_t`` for given updates, and gradients.

Computes :func:`mal_kernels.reference.momentum_scan`. A program owns ``BF`` of the ``F`` numbers of
one row's and head's state and walks the row's tokens a tile at a time: two associative scans over
the tile, then the last state of the tile is carried on. So ``u`` is read and ``S`` and ``W`` are
written once, whatever the length, and the order of every sum is fixed. Long sequences with too few
programs are cut into segments, scanned twice: from zero, then from where the segment before ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import ScanCall
from .tiles import (
    dense,
    first_order,
    launch_options,
    load_rows,
    meta,
    power_of_2,
    row_bounds,
    store_rows,
)


@triton.jit
def scan_tile(b_gate, b_x, b_carry, REVERSE: tl.constexpr):
    """``y_t = gate_t y_{t−1} + x_t`` over a tile ``[BT, BF]``, from ``b_carry`` ``[BF]``.

    Also the carry of the next tile: ``y`` of the tile's last token. REVERSE: from t + 1 to t.
    """
    BT: tl.constexpr = b_x.shape[0]
    b_gate = tl.broadcast_to(b_gate[:, None], b_x.shape)
    b_gate, b_y = tl.associative_scan((b_gate, b_x), 0, first_order, reverse=REVERSE)
    b_y += b_gate * b_carry[None, :]
    last = tl.arange(0, BT) == (0 if REVERSE else BT - 1)
    return b_y, tl.sum(tl.where(last[:, None], b_y, 0.0), 0)


@triton.jit
def load_gate(p, o_g, m, IS_GIVEN: tl.constexpr):
    """A gate in float32, 0 where it is not given or masked."""
    if IS_GIVEN:
        b_gate = tl.load(p + o_g, mask=m, other=0.0).to(tl.float32)
    else:
        b_gate = tl.zeros(o_g.shape, tl.float32)
    return b_gate


@triton.jit(do_not_specialize=["T"])
def momentum_scan_fwd_kernel(
    p_u, p_momentum, p_decay, p_w0, p_s0, p_cu, p_w, p_s, T,
    H: tl.constexpr, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_STATE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """``S`` and ``W`` of all tokens of one row and head, ``BF`` of their features.

    Grid (blocks of F, H, rows).
    """
    i_h, i_n = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin, end = row_bounds(i_n, p_cu, T, IS_VARLEN)
    o_f = tl.program_id(0) * BF + tl.arange(0, BF)
    b_w, b_s = tl.zeros([BF], tl.float32), tl.zeros([BF], tl.float32)
    if HAS_STATE:
        o_state = (i_n.to(tl.int64) * H + i_h) * F + o_f
        b_w = tl.load(p_w0 + o_state, mask=o_f < F, other=0.0)
        b_s = tl.load(p_s0 + o_state, mask=o_f < F, other=0.0)
    for i_t in range(begin, end, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t, o_g = o_t < end, o_t * H + i_h
        b_x = load_rows(p_u, o_g * F, m_t, o_f, F).to(tl.float32)  # [BT, BF]
        if HAS_MOMENTUM:
            b_momentum = load_gate(p_momentum, o_g, m_t, True)
            b_x, b_s = scan_tile(b_momentum, b_x, b_s, False)
        store_rows(p_s, b_x, o_g * F, m_t, o_f, F)
        b_decay = load_gate(p_decay, o_g, m_t, HAS_DECAY)
        b_x, b_w = scan_tile(1 - b_decay, b_x, b_w, False)
        store_rows(p_w, b_x, o_g * F, m_t, o_f, F)


@triton.jit
def load_previous(p, p_0, o_t, i_h, m_t, begin, o_state, o_f, H: tl.constexpr, F: tl.constexpr,
                  HAS_STATE: tl.constexpr):  # fmt: skip
    """The state before each token of a tile: the token before it, or the row's initial state."""
    b_x = load_rows(p, ((o_t - 1) * H + i_h) * F, m_t & (o_t > begin), o_f, F)
    if HAS_STATE:
        b_0 = tl.load(p_0 + o_state, mask=o_f < F, other=0.0)
        b_x = tl.where((o_t == begin)[:, None], b_0[None, :], b_x)
    return b_x


@triton.jit(do_not_specialize=["T", "TOKENS"])
def momentum_scan_bwd_kernel(
    p_dw, p_ds, p_w, p_s, p_momentum, p_decay, p_w0, p_s0, p_cu,
    p_du, p_dmomentum, p_ddecay, p_dw0, p_ds0, T, TOKENS,
    H: tl.constexpr, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_STATE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """The recurrence backwards; ``λ`` is the gradient of ``W_t`` and ``μ`` of ``S_t``.

    ::

        λ_t = dW_t + (1 − α_{t+1}) λ_{t+1}       dα_t = −⟨λ_t, W_{t−1}⟩      dW_0 = (1 − α_1) λ_1
        μ_t = dS_t + λ_t + η_{t+1} μ_{t+1}       dη_t =  ⟨μ_t, S_{t−1}⟩      dS_0 = η_1 μ_1
        du_t = μ_t

    Grid as forward; the gates' gradients are partial sums, one per block of F.
    """
    i_f, i_h, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin, end = row_bounds(i_n, p_cu, T, IS_VARLEN)
    o_f = i_f * BF + tl.arange(0, BF)
    o_state = (i_n.to(tl.int64) * H + i_h) * F + o_f
    o_partial = i_f.to(tl.int64) * TOKENS * H
    b_lambda, b_mu = tl.zeros([BF], tl.float32), tl.zeros([BF], tl.float32)
    n_tiles = (end - begin + BT - 1) // BT
    for i in range(0, n_tiles):
        o_t = begin + (n_tiles - 1 - i) * BT + tl.arange(0, BT)
        m_t, o_g = o_t < end, o_t * H + i_h
        m_next = o_t + 1 < end
        b_dw = load_rows(p_dw, o_g * F, m_t, o_f, F)  # [BT, BF]
        b_decay = load_gate(p_decay, o_g + H, m_next, HAS_DECAY)
        b_dw, b_lambda = scan_tile(1 - b_decay, b_dw, b_lambda, True)
        b_ds = load_rows(p_ds, o_g * F, m_t, o_f, F) + b_dw
        if HAS_MOMENTUM:
            b_momentum = load_gate(p_momentum, o_g + H, m_next, True)
            b_ds, b_mu = scan_tile(b_momentum, b_ds, b_mu, True)
            b_s = load_previous(
                p_s, p_s0, o_t, i_h, m_t, begin, o_state, o_f, H, F, HAS_STATE
            )  # fmt: skip
            tl.store(p_dmomentum + o_partial + o_g, tl.sum(b_ds * b_s, 1), mask=m_t)
        store_rows(p_du, b_ds, o_g * F, m_t, o_f, F)
        if HAS_DECAY:
            b_w = load_previous(
                p_w, p_w0, o_t, i_h, m_t, begin, o_state, o_f, H, F, HAS_STATE
            )  # fmt: skip
            tl.store(p_ddecay + o_partial + o_g, -tl.sum(b_dw * b_w, 1), mask=m_t)
    if HAS_STATE:
        # a row without tokens has λ = μ = 0
        o_first, m_first = begin * H + i_h + tl.arange(0, 1), begin + tl.arange(0, 1) < end
        b_decay = load_gate(p_decay, o_first, m_first, HAS_DECAY)
        b_momentum = load_gate(p_momentum, o_first, m_first, HAS_MOMENTUM)
        tl.store(p_dw0 + o_state, (1 - b_decay) * b_lambda, mask=o_f < F)
        tl.store(p_ds0 + o_state, b_momentum * b_mu, mask=o_f < F)


def scan_fwd(call: ScanCall) -> tuple[Tensor, Tensor]:
    """``weights`` and ``momentum`` after every token, float32 in the shape of ``update``."""
    update = call.update
    length = None if call.cu_seqlens is not None else segment_length(update)
    if length is None:
        return _scan_fwd(call)
    segments = _Segments.of(call, length)
    ends = [x[0, segments.last] for x in _scan_fwd(segments.starting([]))]
    starts = segments.carried(*ends)
    weights, trace = _scan_fwd(segments.starting(starts))
    return weights.view(update.shape), trace.view(update.shape)


def _scan_fwd(call: ScanCall) -> tuple[Tensor, Tensor]:
    update, momentum, decay, (w0, s0), cu_seqlens = _contiguous(call)
    static = _static(call)
    weights, trace = (update.new_empty(update.shape, dtype=torch.float32) for _ in range(2))
    momentum_scan_fwd_kernel[_grid(update, cu_seqlens, static)](
        update, momentum, decay, w0, s0, cu_seqlens, weights, trace, update.shape[1], **static
    )
    return weights, trace


def scan_bwd(
    d_weights: Tensor, d_trace: Tensor, weights: Tensor, trace: Tensor, call: ScanCall
) -> list[Tensor]:
    """Gradients of update, momentum, decay and state, absent ones left out."""
    grads = (d_weights, d_trace, weights, trace)
    length = None if call.cu_seqlens is not None else segment_length(call.update)
    if length is None:
        return _given(_scan_bwd(*grads, call))
    segments = _Segments.of(call, length)
    d_weights, d_trace, weights, trace = (x.reshape(1, -1, *x.shape[2:]) for x in grads)
    rest = (weights, trace, segments.starting(segments.before(weights, trace)))
    *_, d_w, d_s = _scan_bwd(d_weights, d_trace, *rest)  # of each segment alone
    d_w, d_s = segments.carried_back(d_w, d_s)
    d_weights = d_weights.index_add(1, segments.last, d_w.unsqueeze(0))
    d_trace = d_trace.index_add(1, segments.last, d_s.unsqueeze(0))
    *d_tokens, d_w, d_s = _scan_bwd(d_weights, d_trace, *rest)
    pairs = zip(d_tokens, call[:3], strict=True)
    d_tokens = [None if d is None else d.view_as(x) for d, x in pairs]
    d_state = [x.view(-1, segments.count, *x.shape[1:])[:, 0].contiguous() for x in (d_w, d_s)]
    return _given([*d_tokens, *(d_state if call.state else ())])


def _given(tensors: list[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _scan_bwd(
    d_weights: Tensor, d_trace: Tensor, weights: Tensor, trace: Tensor, call: ScanCall
) -> list[Tensor | None]:
    update, momentum, decay, (w0, s0), cu_seqlens = _contiguous(call)
    d_weights, d_trace = d_weights.contiguous(), d_trace.contiguous()
    static = _static(call)
    grid = _grid(update, cu_seqlens, static)
    d_update = update.new_empty(update.shape)
    d_gates = [
        None if g is None else g.new_empty(grid[0], *g.shape, dtype=torch.float32)
        for g in (momentum, decay)
    ]
    d_state = [None if x is None else x.new_empty(x.shape) for x in (w0, s0)]
    momentum_scan_bwd_kernel[grid](
        *(d_weights, d_trace, weights, trace, momentum, decay, w0, s0, cu_seqlens),
        *(d_update, *d_gates, *d_state, update.shape[1], update.shape[:2].numel()),
        **static,
    )
    for i, gate in enumerate((momentum, decay)):
        if gate is not None:
            d_gates[i] = d_gates[i].sum(0).to(gate.dtype)
    return [d_update, *d_gates, *d_state]


# --- long sequences: segments of a row are rows of a ragged batch --------------------------------


def segment_length(update: Tensor) -> int | None:
    """Tokens of a segment where rows, heads and features alone leave a GPU idle, else None."""
    batch, tokens, heads, *features = update.shape
    programs = batch * heads * triton.cdiv(math.prod(features), 64)
    if tokens < 4096 or programs >= 128:
        return None
    return max(256, triton.next_power_of_2(tokens // 64))


class _Segments(NamedTuple):
    """Every row cut into ``count`` segments, as one ragged batch of ``B · count`` sequences.

    A segment takes its start ``(W, S)`` to ``β W + f S + w`` and ``ε S + s``, where ``(w, s)`` is
    where it ends from zero: a first-order recurrence over segments, for which the scan itself
    serves.
    """

    tokens: tuple[Tensor, Tensor | None, Tensor | None]  # update, momentum, decay [1, B·T, H, ...]
    state: list[Tensor]  # W and S [B, H, ...]
    count: int
    cu_seqlens: Tensor
    beta: Tensor  # [B, count, H], as f and epsilon
    f: Tensor
    epsilon: Tensor

    @classmethod
    def of(cls, call: ScanCall, length: int) -> _Segments:
        update = call.update
        batch, size, heads, *features = update.shape
        count = triton.cdiv(size, length)
        at = torch.arange(count + 1, device=update.device) * length
        begin = torch.arange(batch, device=update.device).unsqueeze(1) * size + at[:-1]
        cu_seqlens = torch.cat([begin.flatten(), at.new_full((1,), batch * size)])
        tokens = [None if x is None else x.reshape(1, -1, *x.shape[2:]) for x in call[:3]]
        state = call.state or [update.new_zeros(batch, heads, *features, dtype=torch.float32)] * 2
        # what becomes of S = 1 alone and of W = 1 alone when nothing is added
        nothing = update.new_zeros(1, batch * size, heads, 2, dtype=torch.float32)
        units = [nothing.new_zeros(batch * count, heads, 2) for _ in range(2)]
        units[0][..., 1] = units[1][..., 0] = 1
        unit_w, unit_s = _scan_fwd(ScanCall(nothing, *tokens[1:], units, cu_seqlens))
        ends = (x[0, cu_seqlens[1:] - 1].view(batch, count, heads, 2) for x in (unit_w, unit_s))
        (f, beta), (epsilon, _) = (x.unbind(-1) for x in ends)
        return cls(tuple(tokens), state, count, cu_seqlens, beta, f, epsilon)

    def starting(self, states: list[Tensor]) -> ScanCall:
        """The scan of all segments, each from its own of ``states``, or from zero."""
        return ScanCall(*self.tokens, states, self.cu_seqlens)

    @property
    def last(self) -> Tensor:
        """The last token of every segment ``[B · count]``."""
        return self.cu_seqlens[1:] - 1

    def carried(self, w: Tensor, s: Tensor) -> list[Tensor]:
        """States before every segment ``[B · count, H, ...]`` from their ends from zero."""
        w, s = (self._by_row(x) for x in (w, s))
        _, s = _scan_fwd(ScanCall(s, self.epsilon, None, self.state, None))
        s = self._shifted(s, self.state[1])
        w = w + self._wide(self.f, s) * s
        w, _ = _scan_fwd(ScanCall(w, None, 1 - self.beta, self.state, None))
        return [x.flatten(0, 1) for x in (self._shifted(w, self.state[0]), s)]

    def before(self, weights: Tensor, trace: Tensor) -> list[Tensor]:
        """States before every segment from those after every token."""
        ends = (self._by_row(x[0, self.last]) for x in (weights, trace))
        pairs = zip(ends, self.state, strict=True)
        return [self._shifted(end, start).flatten(0, 1) for end, start in pairs]

    def carried_back(self, d_w: Tensor, d_s: Tensor) -> list[Tensor]:
        """Gradients of the state after every segment from those of each segment alone before it."""
        zero = torch.zeros_like(self.state[0])
        d_w, d_s = (self._by_row(x).flip(1) for x in (d_w, d_s))
        beta, f, epsilon = (x.flip(1) for x in (self.beta, self.f, self.epsilon))
        d_w, _ = _scan_fwd(ScanCall(d_w, None, 1 - beta, [], None))
        d_w = self._shifted(d_w, zero)
        d_s = d_s + self._wide(f, d_w) * d_w
        _, d_s = _scan_fwd(ScanCall(d_s, epsilon, None, [], None))
        return [x.flip(1).flatten(0, 1) for x in (d_w, self._shifted(d_s, zero))]

    def _by_row(self, x: Tensor) -> Tensor:
        return x.view(-1, self.count, *x.shape[1:])

    @staticmethod
    def _shifted(x: Tensor, first: Tensor) -> Tensor:
        return torch.cat([first.unsqueeze(1), x[:, :-1]], 1)

    @staticmethod
    def _wide(gate: Tensor, x: Tensor) -> Tensor:
        return gate.view(*gate.shape, *[1] * (x.ndim - gate.ndim))


# --- compile-time arguments -----------------------------------------------------------------------


def _contiguous(call: ScanCall) -> ScanCall:
    """The call without strides; its state is two tensors, or two None."""
    initial = [x.contiguous() for x in call.state] or [None, None]
    return ScanCall(*(dense(x) for x in call[:3]), initial, dense(call.cu_seqlens))


def _static(call: ScanCall) -> dict[str, Any]:
    """The compile-time arguments of both kernels, and their launch options."""
    update = call.update
    features = update.shape[3:].numel()
    block = min(64, power_of_2(features))
    return dict(
        H=update.shape[2],
        F=features,
        BT=16 if block == 64 else 2048 // block,  # few features: more of them along time
        BF=block,
        HAS_MOMENTUM=call.momentum is not None,
        HAS_DECAY=call.decay is not None,
        HAS_STATE=len(call.state) > 0,
        IS_VARLEN=call.cu_seqlens is not None,
        **launch_options(4),
    )


def _grid(
    update: Tensor, cu_seqlens: Tensor | None, static: dict[str, Any]
) -> tuple[int, int, int]:
    rows = update.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return triton.cdiv(static["F"], static["BF"]), static["H"], rows


def _example(*shape: int, dtype: torch.dtype, ragged: bool, gates: bool) -> Callable[[], object]:
    def launch() -> object:
        update, gate = meta(*shape, dtype=dtype), meta(*shape[:3], dtype=dtype)
        cu_seqlens = meta(3, dtype=torch.int32) if ragged else None
        state = [meta(2, *shape[2:])] * 2 if gates else []
        given = (gate, gate) if gates else (None, None)
        call = ScanCall(update, *given, state, cu_seqlens)
        weights, trace = scan_fwd(call)
        return scan_bwd(weights, trace, weights, trace, call)

    return launch


EXAMPLES = {
    "F8192 fp32": _example(2, 4096, 4, 64, 128, dtype=torch.float32, ragged=False, gates=True),
    "F64 bf16 ragged": _example(1, 4096, 4, 64, dtype=torch.bfloat16, ragged=True, gates=True),
    "F8192 bf16 no gates": _example(
        2, 96, 4, 8192, dtype=torch.bfloat16, ragged=False, gates=False
    ),
    "F1 fp32": _example(2, 100_000, 4, dtype=torch.float32, ragged=False, gates=True),
}
