"""One chunk of the memory in closed form, all rows and heads at once, and its gradients.

``G`` rows and heads, ``C`` tokens. Every layer's gradient is of rank one, ``g_s = x_s ⊗ δ_s``, so
all that is made of a chunk's tokens are these factors (:class:`Factors`), what they add to the
weights (:func:`write`) and what a query reads of it (:func:`read`). Backward goes the other way:
:func:`write_backward` begins a :class:`ChunkGradients`, :func:`read_backward` adds to it, and
:func:`factors_backward` takes it to keys, values and the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import MemoryCall
from ..network import ACTIVATIONS, LAYER_NORM_EPS, memory_network
from .activations import ACTIVATION_BACKWARD, ACTIVATION_SECOND, layer_norm, layer_norm_backward
from .memory_read import network_backward
from .portable import per_head
from .steps import ChunkStep, TokenSteps

Layers = Sequence[Tensor]  # one tensor per layer, γ last


class Start(NamedTuple):
    """The state before a chunk, and decay's target (empty if there is none)."""

    weights: Layers
    trace: Layers
    anchor: Layers
    init: Layers


class Factors(NamedTuple):
    """Factors are what a chunk's gradients are made of; ``residual_norm`` puts γ's last."""

    xs: list[Tensor]  # [G, C, d_in] of every layer
    zs: list[Tensor]  # [G, C, d_out], before the activation
    us: list[Tensor]  # [G, C, d_out] of all but the last layer, δ before act'(z)
    raw: list[Tensor]  # [G, C, d_out], δ before it is clipped
    deltas: list[Tensor]
    scale: Tensor | None  # [G, C, 1], of clipping
    error: Tensor  # [G, C, D]
    norm: tuple[Tensor, Tensor] | None  # normed and 1 / std

    @property
    def surprise(self) -> Tensor:
        """``[G, C]``."""
        return self.error.square().sum(-1)


class ChunkGradients(NamedTuple):
    """Gradients of what a chunk starts from and of its factors, to be added to in place."""

    weights: list[Tensor]
    trace: list[Tensor]
    init: list[Tensor]
    xs: list[Tensor]
    deltas: list[Tensor]
    steps: TokenSteps | ChunkStep


# --- the factors ----------------------------------------------------------------------------------


def factors(anchor: Layers, k: Tensor, v: Tensor, call: MemoryCall) -> Factors:
    """``x_s`` and ``δ_s`` of every layer."""
    act, act_backward = ACTIVATIONS[call.activation], ACTIVATION_BACKWARD[call.activation]
    layers = anchor[:-1] if call.residual_norm else anchor
    xs, zs, norm = [k], [k @ layers[0]], None
    for w in layers[1:]:
        xs.append(act(zs[-1]))
        zs.append(xs[-1] @ w)
    if call.residual_norm:
        norm = layer_norm(zs[-1])
        gain = 1 + anchor[-1].unsqueeze(-2)
        error = k + gain * norm[0] - v
        raw = [layer_norm_backward(2 * error * gain, norm[0], norm[1])]
    else:
        error = zs[-1] - v
        raw = [2 * error]
    us: list[Tensor] = []
    for w, z in zip(reversed(layers[1:]), reversed(zs[:-1]), strict=True):
        us.insert(0, raw[0] @ w.mT)
        raw.insert(0, act_backward(us[0], z))
    if norm is not None:
        raw.append(2 * error * norm[0])
    scale = _clip_scale(xs, raw, call.max_grad_norm)
    deltas = raw if scale is None else [scale * d for d in raw]
    return Factors(xs, zs, us, raw, deltas, scale, error, norm)


def _clip_scale(xs: Layers, raw: Layers, max_norm: float | None) -> Tensor | None:
    """Returns the scale that takes every token's gradient to norm ≤ max_norm."""
    if max_norm is None:
        return None
    square = _norm_square(*_squares(xs, raw))
    return max_norm * square.clamp(min=max_norm**2).rsqrt()


def _squares(xs: Layers, raw: Layers) -> tuple[list[Tensor], list[Tensor]]:
    """``‖x_s‖²`` and ``‖δ_s‖²`` ``[G, C, 1]`` of every layer; γ has no x."""
    of_x, of_delta = ([x.square().sum(-1, keepdim=True) for x in layer] for layer in (xs, raw))
    return of_x + [torch.ones_like(of_x[0])] * (len(raw) - len(xs)), of_delta


def _norm_square(of_x: Layers, of_delta: Layers) -> Tensor:
    """``‖g_s‖² = Σ_layers ‖x_s‖² ‖δ_s‖²``."""
    return torch.stack([x * d for x, d in zip(of_x, of_delta, strict=True)]).sum(0)


def factors_backward(
    f: Factors, anchor: Layers, grads: ChunkGradients, d_surprise: Tensor, call: MemoryCall
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of k, v and the anchor."""
    d_xs, d_raw = _clip_backward(f, grads, call.max_grad_norm)
    layers = anchor[:-1] if call.residual_norm else anchor
    act_backward = ACTIVATION_BACKWARD[call.activation]
    act_second = ACTIVATION_SECOND[call.activation]
    d_anchor = [torch.zeros_like(w) for w in layers]
    d_zs: list[Tensor] = []
    # δ_i = u ⊙ act'(z_i) with u = δ_{i+1} W_{i+1}ᵀ, from the first layer to the last
    for i, (w, z, u) in enumerate(zip(layers[1:], f.zs, f.us, strict=False)):
        d_u = act_backward(d_raw[i], z)
        d_zs.append(d_raw[i] * u * act_second(z))
        d_raw[i + 1] = d_raw[i + 1] + d_u @ w
        d_anchor[i + 1].baddbmm_(d_u.mT, f.raw[i + 1])
    last = len(layers) - 1
    d_error = 2 * d_surprise.unsqueeze(-1) * f.error
    if f.norm is None:
        d_error = d_error.add_(d_raw[last], alpha=2)
        d_zs.append(d_error)
        d_k = d_xs[0]
    else:
        d_error, d_gain, d_z = _normed_error_backward(f, anchor[-1], d_raw[-2:], d_error)
        d_zs.append(d_z)
        d_k = d_xs[0] + d_error
    for i in reversed(range(len(layers))):
        d_anchor[i].baddbmm_(f.xs[i].mT, d_zs[i])
        if i:
            d_x = torch.baddbmm(d_xs[i], d_zs[i], layers[i].mT)
            d_zs[i - 1] = d_zs[i - 1] + act_backward(d_x, f.zs[i - 1])
    d_k = torch.baddbmm(d_k, d_zs[0], layers[0].mT)
    if f.norm is not None:
        d_anchor.append(d_gain)
    return d_k, -d_error, d_anchor


def _normed_error_backward(
    f: Factors, gamma: Tensor, d_raw: Layers, d_error: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With ``residual_norm``: gradients of the error, of γ and of the last layer's output z.

    ``n = LN(z)``, ``e = k + g n − v``, ``δ = P(2 e g) / std`` with the projection ``P`` of a
    LayerNorm's backward, and γ's own gradient ``2 e n``; ``d_raw`` are those of the last two.
    """
    assert f.norm is not None
    (n, inverse_std), (d_delta, d_gamma), e = f.norm, d_raw, f.error
    gain, mean = 1 + gamma.unsqueeze(-2), _mean
    d = 2 * e * gain
    d_d = layer_norm_backward(d_delta, n, inverse_std)
    d_error = d_error + 2 * (d_gamma * n + gain * d_d)
    d_n = 2 * d_gamma * e - inverse_std * (d_delta * mean(d * n) + d * mean(d_delta * n))
    d_gain = (2 * e * d_d + d_error * n).sum(-2)
    d_z = layer_norm_backward(d_n + gain * d_error, n, inverse_std)
    return d_error, d_gain, d_z - inverse_std * n * mean(d_delta * f.raw[-2])


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _clip_backward(
    f: Factors, grads: ChunkGradients, max_norm: float | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of ``xs`` and of ``δ`` before clipping."""
    if f.scale is None or max_norm is None:
        return grads.xs, grads.deltas
    pairs = zip(grads.deltas, f.raw, strict=True)
    d_scale = torch.stack([(d * raw).sum(-1, keepdim=True) for d, raw in pairs]).sum(0)
    of_x, of_delta = _squares(f.xs, f.raw)
    clipped = _norm_square(of_x, of_delta) >= max_norm**2
    # of scale = m / √s, once for each of the two factors in s = Σ ‖x‖² ‖δ‖²
    d_square = torch.where(clipped, -d_scale * f.scale**3 / max_norm**2, 0.0)
    d_xs = [d + d_square * of_delta[i] * f.xs[i] for i, d in enumerate(grads.xs)]
    d_raw = [f.scale * d + d_square * of_x[i] * f.raw[i] for i, d in enumerate(grads.deltas)]
    return d_xs, d_raw


# --- the write ------------------------------------------------------------------------------------


def write(start: Start, f: Factors, c: TokenSteps | ChunkStep) -> tuple[list[Tensor], list[Tensor]]:
    """The closed form at the last token: new weights and new momentum."""
    gates = c.after_the_last()
    new_weights, new_trace = [], []
    for i, (w, s, delta) in enumerate(zip(start.weights, start.trace, f.deltas, strict=True)):
        beta, of_s, e0 = (per_head(gate, w) for gate in gates)
        kept = torch.addcmul(beta * w, of_s, s)
        if start.init:
            kept = torch.addcmul(kept, 1 - beta, start.init[i])
        w, s = c.descend(kept, e0 * s, f.xs[i] if i < len(f.xs) else None, delta)
        new_weights.append(w)
        new_trace.append(s)
    return new_weights, new_trace


def write_backward(
    d_weights: Layers, d_trace: Layers, start: Start, f: Factors, c: TokenSteps | ChunkStep
) -> ChunkGradients:
    """Gradients from those of the weights and the momentum after the chunk."""
    grads = ChunkGradients([], [], [], [], [], c.zeros())
    gates, d_gates = c.after_the_last(), grads.steps.after_the_last()
    for i, (w, s, d_w, d_s) in enumerate(
        zip(start.weights, start.trace, d_weights, d_trace, strict=True)
    ):
        beta, of_s, e0 = (per_head(gate, w) for gate in gates)
        from_target = w - start.init[i] if start.init else w
        for d, a, b in zip(d_gates, (d_w, d_w, d_s), (from_target, s, s), strict=True):
            d.add_((a * b).flatten(1).sum(1))
        grads.weights.append(beta * d_w)
        grads.trace.append(torch.addcmul(of_s * d_w, e0, d_s))
        if start.init:
            grads.init.append((1 - beta) * d_w)
        x = f.xs[i] if i < len(f.xs) else None
        d_x, d_delta = c.descend_backward(d_w, d_s, x, f.deltas[i], grads.steps)  # type: ignore[arg-type]
        grads.deltas.append(d_delta)
        if d_x is not None:
            grads.xs.append(d_x)
    return grads


# --- the read -------------------------------------------------------------------------------------


def read(
    q: Tensor, start: Start, f: Factors, c: TokenSteps | ChunkStep, call: MemoryCall
) -> Tensor:
    """``M(q_t; W_t)`` of every token without forming any ``W_t``; chunk steps read the start."""
    if isinstance(c, ChunkStep):
        return memory_network(start.weights, q, call.activation, call.residual_norm)
    layers = _layers_inside(q, start, f, c, call)
    z = layers[-1].z
    if not call.residual_norm:
        return z
    normed = F.layer_norm(z, z.shape[-1:], eps=LAYER_NORM_EPS)
    return q + _gain_inside(start, f, c) * normed


class _LayerInside(NamedTuple):
    """One layer read at the weights of each token: its input, what it is made of, its output."""

    h: Tensor  # [G, C, d_in]
    by_w: Tensor  # [G, C, d_out], h W, as h S and h W_init
    by_s: Tensor
    by_init: Tensor | None
    scores: Tensor  # [G, C, C], h Xᵀ
    z: Tensor  # [G, C, d_out]


def _layers_inside(
    q: Tensor, start: Start, f: Factors, c: TokenSteps, call: MemoryCall
) -> list[_LayerInside]:
    """Every layer, from the first to the last."""
    act, layers = ACTIVATIONS[call.activation], []
    beta, of_s = c.beta.unsqueeze(-1), c.f.unsqueeze(-1)
    h = q
    for i, x in enumerate(f.xs):
        by_w, by_s, scores = h @ start.weights[i], h @ start.trace[i], h @ x.mT
        by_init = h @ start.init[i] if start.init else None
        z = torch.addcmul(beta * by_w, of_s, by_s)
        if by_init is not None:
            z = torch.addcmul(z, 1 - beta, by_init)
        z = torch.baddbmm(z, c.w * scores, f.deltas[i], alpha=-1)
        layers.append(_LayerInside(h, by_w, by_s, by_init, scores, z))
        if i + 1 < len(f.xs):
            h = act(z)
    return layers


def _gain_inside(start: Start, f: Factors, c: TokenSteps) -> Tensor:
    """``1 + γ_t`` ``[G, C, D]`` of every token."""
    beta, of_s = c.beta.unsqueeze(-1), c.f.unsqueeze(-1)
    gamma, trace = (x[-1].unsqueeze(-2) for x in (start.weights, start.trace))
    gain = 1 + beta * gamma + of_s * trace - c.w @ f.deltas[-1]
    return gain + (1 - beta) * start.init[-1].unsqueeze(-2) if start.init else gain


def read_backward(
    d_output: Tensor,
    q: Tensor,
    start: Start,
    f: Factors,
    c: TokenSteps | ChunkStep,
    call: MemoryCall,
    grads: ChunkGradients,
) -> Tensor:
    """The gradient of ``q``; adds the others to ``grads``."""
    if isinstance(c, ChunkStep):
        options = (call.activation, call.residual_norm)
        d_q, d_weights = network_backward(start.weights, q, d_output, *options)
        for total, d in zip(grads.weights, d_weights, strict=True):
            total.add_(d)
        return d_q
    assert isinstance(grads.steps, TokenSteps)
    layers = _layers_inside(q, start, f, c, call)
    d = d_output
    if call.residual_norm:
        normed, inverse_std = layer_norm(layers[-1].z)
        _gain_backward(d * normed, start, f, c, grads)
        d = layer_norm_backward(d * _gain_inside(start, f, c), normed, inverse_std)
    beta, of_s = c.beta.unsqueeze(-1), c.f.unsqueeze(-1)
    for i, (h, by_w, by_s, by_init, scores, _) in reversed([*enumerate(layers)]):
        d_by_w, d_by_s = beta * d, of_s * d
        d_h = torch.baddbmm(d_by_w @ start.weights[i].mT, d_by_s, start.trace[i].mT)
        grads.weights[i].baddbmm_(h.mT, d_by_w)
        grads.trace[i].baddbmm_(h.mT, d_by_s)
        if by_init is not None:
            d_by_init = d - d_by_w
            d_h.baddbmm_(d_by_init, start.init[i].mT)
            grads.init[i].baddbmm_(h.mT, d_by_init)
            by_w = by_w - by_init
        grads.steps.beta.add_((d * by_w).sum(-1))
        grads.steps.f.add_((d * by_s).sum(-1))
        d_scores = d @ f.deltas[i].mT
        grads.steps.w.addcmul_(scores, d_scores, value=-1)
        d_scores *= c.w
        d_h.baddbmm_(d_scores, f.xs[i], alpha=-1)
        grads.xs[i].baddbmm_(d_scores.mT, h, alpha=-1)
        grads.deltas[i].baddbmm_((c.w * scores).mT, d, alpha=-1)
        d = ACTIVATION_BACKWARD[call.activation](d_h, layers[i - 1].z) if i else d_h
    return d + d_output if call.residual_norm else d


def _gain_backward(
    d_gain: Tensor, start: Start, f: Factors, c: TokenSteps, grads: ChunkGradients
) -> None:
    """Adds to ``grads`` what :func:`_gain_inside` gives."""
    assert isinstance(grads.steps, TokenSteps)
    beta, of_s = c.beta.unsqueeze(-1), c.f.unsqueeze(-1)
    gamma, trace = start.weights[-1], start.trace[-1]
    if start.init:
        gamma = gamma - start.init[-1]
        grads.init[-1].add_(((1 - beta) * d_gain).sum(-2))
    grads.steps.beta.add_((d_gain * gamma.unsqueeze(-2)).sum(-1))
    grads.steps.f.add_((d_gain * trace.unsqueeze(-2)).sum(-1))
    grads.steps.w.baddbmm_(d_gain, f.deltas[-1].mT, alpha=-1)
    grads.deltas[-1].baddbmm_(c.w.mT, d_gain, alpha=-1)
    grads.weights[-1].add_((beta * d_gain).sum(-2))
    grads.trace[-1].add_((of_s * d_gain).sum(-2))
