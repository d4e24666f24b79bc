"""The memory of two layers in plain PyTorch, as one would write it without this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..state import MemoryState

Step = Literal["token", "chunk"]
Op: TypeAlias = Callable[..., tuple[Tensor, MemoryState]]  # of q, k, v, three gates and the state


def _loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
    """``‖M(k) − v‖²`` ``[G, C]`` for tokens ``[G, C, D]`` and weights ``[G, ...]``."""
    w1, w2 = weights
    return (F.gelu(k @ w1) @ w2 - v).square().sum(-1)


def _inner_gradient(
    weights: tuple[Tensor, ...], k: Tensor, v: Tensor, lr: Tensor
) -> tuple[Tensor, ...]:
    """``Σ lr ∇loss`` by autograd; differentiable if gradients are wanted outside."""
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        at = weights if outer else tuple(w.detach().requires_grad_() for w in weights)
        total = (lr * _loss(at, k, v)).sum()
        return torch.autograd.grad(total, at, create_graph=outer)


def _per_head(function: Callable[..., tuple[list[Tensor], Any, Any]]) -> Op:
    """Rows and heads in one dimension ``G``, and back: q, k, v ``[G, T, D]``, gates ``[G, n]``."""

    def op(*arguments: Any) -> tuple[Tensor, MemoryState]:
        *tokens, state = arguments
        batch, _, heads = tokens[0].shape[:3]
        folded = [x.transpose(1, 2).flatten(0, 1) for x in tokens]
        fast = [tuple(w.flatten(0, 1) for w in field) for field in state[:2]]
        outputs, *fields = function(*folded, *fast)
        y = torch.cat(outputs, 1).unflatten(0, (batch, heads)).transpose(1, 2)
        weights, momentum = (
            tuple(w.unflatten(0, (batch, heads)) for w in field) for field in fields
        )
        return y, MemoryState(weights, momentum)

    return op


def by_autograd(chunk_size: int, step: Step) -> Op:
    """The recurrence as it is written: a gradient by autograd for every step."""
    size = 1 if step == "token" else chunk_size

    def run(q, k, v, lr, momentum, decay, w, s):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        outputs = []
        for i, start in enumerate(range(0, q.shape[1], size)):
            at, one = slice(start, start + size), (slice(None), i, None, None)
            before = w
            if start % chunk_size == 0:
                anchor = w
            g = _inner_gradient(anchor, k[:, at], v[:, at], lr[:, at])
            s = tuple(momentum[one] * a - b for a, b in zip(s, g, strict=True))
            w = tuple((1 - decay[one]) * a + b for a, b in zip(w, s, strict=True))
            w1, w2 = w if step == "token" else before
            outputs.append(F.gelu(q[:, at] @ w1) @ w2)
        return outputs, w, s

    return _per_head(run)


def _closed_chunk(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor, decay: Tensor,
    w1: Tensor, w2: Tensor, s1: Tensor, s2: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One chunk ``[G, C, D]`` in closed form: the output, and the four fast weights after it."""
    below = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril(-1)

    def products(gate: Tensor) -> Tensor:  # [G, C, C]: gate_{s+1} … gate_t
        return torch.where(below, gate.unsqueeze(-1), 1.0).cumprod(-2).tril()

    decays, momenta = products(1 - decay), products(momentum)
    w = (decays @ momenta) * lr.unsqueeze(-2)
    beta, e0 = (1 - decay).cumprod(-1).unsqueeze(-1), momentum.cumprod(-1).unsqueeze(-1)
    f = decays @ e0
    z = k @ w1
    h = F.gelu(z)
    d2 = 2 * (h @ w2 - v)
    d1 = torch.ops.aten.gelu_backward(d2 @ w2.mT, z)
    zq = F.gelu(beta * (q @ w1) + f * (q @ s1) - (w * (q @ k.mT)) @ d1)
    y = beta * (zq @ w2) + f * (zq @ s2) - (w * (zq @ h.mT)) @ d2
    b, c, e = beta[:, -1:], f[:, -1:], e0[:, -1:]
    of_w, of_s = w[:, -1].unsqueeze(-1), (momenta[:, -1] * lr).unsqueeze(-1)
    return (
        y,
        b * w1 + c * s1 - (of_w * k).mT @ d1,
        b * w2 + c * s2 - (of_w * h).mT @ d2,
        e * s1 - (of_s * k).mT @ d1,
        e * s2 - (of_s * h).mT @ d2,
    )


def closed_form(chunk_size: int, compiled: bool = False) -> Op:
    """The closed form in plain PyTorch, differentiated by autograd; its chunk compiled if asked."""
    advance = torch.compile(_closed_chunk, dynamic=False) if compiled else _closed_chunk

    def run(q, k, v, lr, momentum, decay, w, s):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        outputs, fast = [], [*w, *s]
        for start in range(0, q.shape[1], chunk_size):
            at = slice(start, start + chunk_size)
            tokens = (x[:, at].contiguous() for x in (q, k, v, lr, momentum, decay))
            y, *fast = advance(*tokens, *fast)
            outputs.append(y)
        return outputs, fast[:2], fast[2:]

    return _per_head(run)


def lean_form(chunk_size: int) -> Op:
    """The closed form as leanly as plain PyTorch allows, compiled whole for one shape.

    The coefficients of all chunks are computed at once, and the loop over chunks is unrolled.
    """
    whole: Callable[..., Any] = torch.compile(_lean, dynamic=False)

    def op(*arguments: Any) -> tuple[Tensor, MemoryState]:
        *tokens, state = arguments
        y, w1, w2, s1, s2 = whole(*tokens, *state.weights, *state.momentum, chunk_size)
        return y, MemoryState((w1, w2), (s1, s2))

    return op


def _lean(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor, decay: Tensor,
    w1: Tensor, w2: Tensor, s1: Tensor, s2: Tensor, size: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All arguments as the op takes them, ``[B, T, H, ...]``; T is a multiple of ``size``."""
    batch, tokens, heads = q.shape[:3]
    below = torch.ones(size, size, dtype=torch.bool).tril(-1)

    def chunks(x: Tensor) -> Tensor:  # [G, chunks, C, ...]
        return x.transpose(1, 2).flatten(0, 1).unflatten(1, (tokens // size, size))

    def products(gate: Tensor) -> Tensor:  # [..., C, C]: gate_{s+1} … gate_t
        return torch.where(below, gate.unsqueeze(-1), 1.0).cumprod(-2).tril()

    q, k, v, lr, momentum, keep = map(chunks, (q, k, v, lr, momentum, 1 - decay))
    decays, momenta = products(keep), products(momentum)
    e, beta = momentum.cumprod(-1), keep.cumprod(-1)
    w = (decays @ momenta) * lr.unsqueeze(-2)
    f = (decays @ e.unsqueeze(-1)).squeeze(-1)
    of_s = momenta[..., -1, :] * lr
    w1, w2, s1, s2 = (x.flatten(0, 1) for x in (w1, w2, s1, s2))
    outputs = []
    for i in range(tokens // size):
        x, y, b, g, wi = k[:, i], q[:, i], beta[:, i, :, None], f[:, i, :, None], w[:, i]
        z = x @ w1
        h = F.gelu(z)
        d2 = 2 * (h @ w2 - v[:, i])
        d1 = (d2 @ w2.mT) * _gelu_slope(z)
        hq = F.gelu(b * (y @ w1) + g * (y @ s1) - (wi * (y @ x.mT)) @ d1)
        outputs.append(b * (hq @ w2) + g * (hq @ s2) - (wi * (hq @ h.mT)) @ d2)
        end, of_w, of_trace = wi[:, -1, :, None], b[:, -1:], g[:, -1:]
        last, trace = e[:, i, -1, None, None], of_s[:, i, :, None]
        w1 = of_w * w1 + of_trace * s1 - (end * x).mT @ d1
        w2 = of_w * w2 + of_trace * s2 - (end * h).mT @ d2
        s1 = last * s1 - (trace * x).mT @ d1
        s2 = last * s2 - (trace * h).mT @ d2
    y = torch.cat(outputs, 1).unflatten(0, (batch, heads)).transpose(1, 2)
    return y, *(x.unflatten(0, (batch, heads)) for x in (w1, w2, s1, s2))


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * (2 * torch.pi) ** -0.5 * torch.exp(-z * z / 2)
