"""The recurrence of momentum and decay as two associative scans, and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..call import ScanCall, bounds_of
from .portable import fresh, per_head, portable


class _Scan(NamedTuple):
    """Gates, 0 at the first token of a sequence, and where sequences with tokens begin."""

    eta: Tensor  # [B, T, H]
    keep: Tensor  # [B, T, H], 1 − α
    first: tuple[Tensor, Tensor]  # b and t [F] of each first token
    rows: Tensor  # [F], its row of the state
    eta_first: Tensor  # [F, H], the gate there
    keep_first: Tensor

    @classmethod
    def of(cls, call: ScanCall) -> _Scan:
        update, dtype = call.update, torch.promote_types(call.update.dtype, torch.float32)
        zeros = update.new_zeros(update.shape[:3], dtype=dtype)
        eta, alpha = (zeros if g is None else g.to(dtype) for g in (call.momentum, call.decay))
        bounds = bounds_of(update, call.cu_seqlens)
        filled = [(row, b, t) for row, (b, t, end) in enumerate(bounds) if end > t]
        rows, b, t = torch.tensor(filled, device=update.device, dtype=torch.int64).view(-1, 3).T
        begins = torch.zeros(update.shape[:2], dtype=torch.bool, device=update.device)
        begins = rearrange(begins.index_put((b, t), begins.new_ones(())), "b t -> b t 1")
        eta_0, keep_0 = (torch.where(begins, 0.0, gate) for gate in (eta, 1 - alpha))
        return cls(eta_0, keep_0, (b, t), rows, eta[b, t], (1 - alpha)[b, t])

    def before(self, x: Tensor, initial: Tensor | None) -> Tensor:
        """``x`` ``[B, T, H, ...]`` of the token before; at a first token the row's initial one."""
        shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        start = x.new_zeros(()) if initial is None else initial[self.rows].to(x.dtype)
        return shifted.index_put(self.first, start)


def scan_fwd(call: ScanCall) -> tuple[Tensor, Tensor]:
    """``weights`` and ``momentum`` after every token, float32 in the shape of ``update``."""
    with portable(call.update.device):
        scan = _Scan.of(call)
        w_0, s_0 = call.state or (None, None)

        def run(gate: Tensor, gate_first: Tensor, x: Tensor, initial: Tensor | None) -> Tensor:
            """``y_t = gate_t y_{t−1} + x_t``; the initial value joins the first token."""
            if initial is not None:
                start = initial[scan.rows]
                start = per_head(gate_first, start) * start
                x = x.index_put(scan.first, start, accumulate=True)
            return _linear_scan(per_head(gate, x), x)

        trace = run(scan.eta, scan.eta_first, call.update.to(scan.eta.dtype), s_0)
        weights = run(scan.keep, scan.keep_first, trace, w_0)
        return fresh(weights), fresh(trace)


def scan_bwd(
    d_weights: Tensor, d_trace: Tensor, weights: Tensor, trace: Tensor, call: ScanCall
) -> list[Tensor]:
    """Gradients of update, momentum, decay and state, absent ones left out.

    What reaches ``W_t``, and through it ``S_t``, are two scans from the last token to the first.
    """
    with portable(call.update.device):
        scan = _Scan.of(call)
        w_0, s_0 = call.state or (None, None)
        d_w = _reverse_scan(scan.keep, d_weights)
        d_s = _reverse_scan(scan.eta, d_trace + d_w)
        grads = [d_s.to(call.update.dtype)]
        if call.momentum is not None:
            grads.append(_per_gate(d_s, scan.before(trace, s_0)).to(call.momentum.dtype))
        if call.decay is not None:
            grads.append(-_per_gate(d_w, scan.before(weights, w_0)).to(call.decay.dtype))
        for initial, d, gate in zip(
            call.state, (d_w, d_s), (scan.keep_first, scan.eta_first), strict=False
        ):
            d = d[scan.first]
            rows = torch.zeros_like(initial)
            grads.append(rows.index_put((scan.rows,), per_head(gate, d) * d))
        return [fresh(g) for g in grads]


def _linear_scan(gate: Tensor, x: Tensor) -> Tensor:
    """``y_t = gate_t y_{t−1} + x_t`` over dim 1 by recursive doubling: log2(T) steps."""
    shift = 1
    while shift < x.shape[1]:
        x = torch.cat([x[:, :shift], x[:, shift:] + gate[:, shift:] * x[:, :-shift]], 1)
        gate = torch.cat([gate[:, :shift], gate[:, shift:] * gate[:, :-shift]], 1)
        shift *= 2
    return x


def _reverse_scan(gate: Tensor, x: Tensor) -> Tensor:
    """``y_t = x_t + gate_{t+1} y_{t+1}``."""
    later = torch.cat([gate[:, 1:], torch.zeros_like(gate[:, :1])], 1)
    return _linear_scan(per_head(later, x).flip(1), x.flip(1)).flip(1)


def _per_gate(d: Tensor, x: Tensor) -> Tensor:
    """``⟨d, x⟩`` of every token and head ``[B, T, H]``."""
    return (d * x).reshape(*d.shape[:3], -1).sum(-1)
