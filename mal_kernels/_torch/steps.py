"""Coefficients of the closed form: what the gates of a chunk come to, and their gradients.

A gradient of coefficients has their type: :meth:`zeros` makes it, the backward of a chunk adds to
it in place, and :meth:`backward` takes it to the gates, for all chunks at once. No quotient is
taken anywhere: η = 0 and α = 1 are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenSteps(NamedTuple):
    """Rows ``t`` of the closed form: ``R = C`` of them where tokens read, else the last alone."""

    w: Tensor  # [G, R, C], w_ts θ_s
    beta: Tensor  # [G, R]
    f: Tensor  # [G, R]
    e_last: Tensor  # [G, C], E_Cs θ_s
    e0_last: Tensor  # [G]

    @classmethod
    def of(
        cls, lr: Tensor, momentum: Tensor, decay: Tensor, mask: Tensor | None, *, every: bool
    ) -> TokenSteps:
        """From gates ``[..., C]``.

        Where ``mask`` ``[..., C]`` is False no token stands: that slot neither decays nor adds S to
        W.
        """
        rows = slice(None) if every else slice(-1, None)
        _, e, beta, e0, decays = _products(momentum, decay, mask, rows)
        f = (decays @ e0.unsqueeze(-1)).squeeze(-1)
        w, e_last = (decays @ e) * lr.unsqueeze(-2), e[..., -1, :] * lr
        return cls(w, beta[..., rows], f, e_last, e0[..., -1])

    def backward(
        self, lr: Tensor, momentum: Tensor, decay: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three gates ``[..., C]``; ``self`` is the gradient of :meth:`of`.

        A product ``P_ts`` of gates gives to gate ``t`` what reaches any later row, ``(Pᵀ dP)_ts``,
        times the row before, ``P_{t−1,s}``. With ``raw = A E`` that of ``E`` is ``rawᵀ dw``.
        """
        every = self.w.shape[-2] > 1
        rows = slice(None) if every else slice(-1, None)
        a, e, beta, e0, decays = _products(momentum, decay, mask, rows)
        a_rows = a[..., rows, :]
        raw = decays @ e
        d_raw = self.w * lr.unsqueeze(-2)
        d_lr = (self.w * raw).sum(-2) + self.e_last * e[..., -1, :]

        reaches_e = raw.mT @ d_raw + _outer(e[..., -1, :], self.e_last * lr)
        reaches_e0 = _apply(raw.mT, self.f) + e[..., -1, :] * self.e0_last.unsqueeze(-1)
        d_momentum = (reaches_e * _before(e)).sum(-1) + reaches_e0 * _shifted(e0)
        d_decays = d_raw @ e.mT + _outer(self.f, e0)
        if mask is not None:
            d_decays = d_decays * mask.unsqueeze(-2)
        d_a = ((a_rows.mT @ d_decays) * _before(a)).sum(-1)
        d_a = d_a + _apply(a_rows.mT, self.beta) * _shifted(beta)
        if mask is not None:
            d_momentum, d_a = (torch.where(mask, d, 0.0) for d in (d_momentum, d_a))
        return d_lr, d_momentum, -d_a

    def zeros(self) -> TokenSteps:
        """A gradient to be added to."""
        return TokenSteps(*map(torch.zeros_like, self))

    def after_the_last(self) -> tuple[Tensor, Tensor, Tensor]:
        """β, f and ε ``[G]`` of the chunk's last token, as views."""
        return self.beta[..., -1], self.f[..., -1], self.e0_last

    def descend(
        self, w: Tensor, s: Tensor, x: Tensor | None, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``w − Σ_s w_Cs θ_s x_s ⊗ δ_s``, and s with ``E``; ``x=None``: of ``δ_s`` alone."""
        of_w, of_s = (rate.unsqueeze(-1) for rate in (self.w[..., -1, :], self.e_last))
        if x is None:
            return w - (of_w * delta).sum(-2), s - (of_s * delta).sum(-2)
        new_w = torch.baddbmm(w, (of_w * x).mT, delta, alpha=-1)
        return new_w, torch.baddbmm(s, (of_s * x).mT, delta, alpha=-1)

    def descend_backward(
        self, d_w: Tensor, d_s: Tensor, x: Tensor | None, delta: Tensor, grads: TokenSteps
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of ``x`` and ``delta``; adds those of the rates to ``grads``."""
        of_w, of_s = (rate.unsqueeze(-1) for rate in (self.w[..., -1, :], self.e_last))
        if x is None:
            p, r = d_w.unsqueeze(-2), d_s.unsqueeze(-2)
        else:
            p, r = x @ d_w, x @ d_s
        grads.w[..., -1, :].sub_((p * delta).sum(-1))
        grads.e_last.sub_((r * delta).sum(-1))
        d_delta = torch.addcmul(of_w * p, of_s, r).neg_()
        if x is None:
            return None, d_delta
        d_x = (of_w * delta) @ d_w.mT
        return d_x.baddbmm_(of_s * delta, d_s.mT).neg_(), d_delta


class ChunkStep(NamedTuple):
    """One step for the whole chunk: ``w = E = 1``, ``β = 1 − α``, ``f = ε = η``."""

    lr: Tensor  # [G, C], 0 where no token stands
    beta: Tensor  # [G]
    f: Tensor  # [G]
    e0_last: Tensor  # [G]

    @classmethod
    def of(cls, lr: Tensor, momentum: Tensor, decay: Tensor, mask: Tensor | None) -> ChunkStep:
        """From gates ``[...]``; a row without tokens in the chunk keeps its state."""
        if mask is None:
            return cls(lr, 1 - decay, momentum, momentum)
        active = mask.any(-1)
        gates = ((1 - decay, 1.0), (momentum, 0.0), (momentum, 1.0))
        return cls(lr, *(torch.where(active, gate, idle) for gate, idle in gates))

    def backward(
        self, lr: Tensor, momentum: Tensor, decay: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three gates; ``self`` is the gradient of :meth:`of`."""
        d_momentum, d_decay = self.f + self.e0_last, -self.beta
        if mask is not None:
            active = mask.any(-1)
            d_momentum, d_decay = (torch.where(active, d, 0.0) for d in (d_momentum, d_decay))
        return self.lr, d_momentum, d_decay

    def zeros(self) -> ChunkStep:
        """A gradient to be added to."""
        return ChunkStep(*map(torch.zeros_like, self))

    def after_the_last(self) -> tuple[Tensor, Tensor, Tensor]:
        """β, f and ε ``[G]``."""
        return self[1:]

    def descend(
        self, w: Tensor, s: Tensor, x: Tensor | None, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``w − Σ_s θ_s x_s ⊗ δ_s``, and s less the same; ``x=None``: of ``δ_s`` alone."""
        delta = self.lr.unsqueeze(-1) * delta
        total = delta.sum(-2) if x is None else x.mT @ delta
        return w - total, s - total

    def descend_backward(
        self, d_w: Tensor, d_s: Tensor, x: Tensor | None, delta: Tensor, grads: ChunkStep
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of ``x`` and ``delta``; adds those of the rates to ``grads``."""
        total, rate = d_w + d_s, self.lr.unsqueeze(-1)
        p = total.unsqueeze(-2) if x is None else x @ total
        grads.lr.sub_((p * delta).sum(-1))
        d_x = None if x is None else ((rate * delta) @ total.mT).neg_()
        return d_x, (rate * p).neg_()


# --- products of gates ----------------------------------------------------------------------------


def _products(
    momentum: Tensor, decay: Tensor, mask: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``A`` and ``E`` ``[..., C, C]``, β and ε ``[..., C]``, and of ``A`` the rows that are used.

    In those the slots without a token are zero.
    """
    eta, a = momentum, 1 - decay
    if mask is not None:
        eta, a = (torch.where(mask, gate, 1.0) for gate in (eta, a))
    whole = _segment_products(a)
    decays = whole[..., rows, :]
    if mask is not None:
        decays = decays * mask.unsqueeze(-2)
    return whole, _segment_products(eta), a.cumprod(-1), eta.cumprod(-1), decays


def _segment_products(gate: Tensor) -> Tensor:
    """``P_ts = gate_{s+1} … gate_t`` for t ≥ s, else 0: 1-semiseparable, ``[..., C, C]``."""
    size = gate.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=gate.device).tril(-1)
    return torch.where(below, gate.unsqueeze(-1), 1.0).cumprod(-2).tril()


def _before(products: Tensor) -> Tensor:
    """Row ``t − 1`` in the place of row ``t``, the first zero."""
    return F.pad(products[..., :-1, :], (0, 0, 1, 0))


def _shifted(cumulative: Tensor) -> Tensor:
    """The product before each token; 1 before the first."""
    return F.pad(cumulative[..., :-1], (1, 0), value=1.0)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)
