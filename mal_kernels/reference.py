"""The definition: what every op computes, as plain loops over rows and tokens.

Nobody computes with it: it is slow, and every backend is judged by it. Gradients are autograd's.

Symbols. ``B`` rows, ``T`` tokens, ``H`` heads, ``D`` features of a head, ``C`` tokens of a chunk.
``lr`` θ ≥ 0, ``momentum`` η ∈ [0, 1], ``decay`` α ∈ [0, 1], one number per token and head.

Memory (Titans, arXiv 2501.00663), fast weights ``W`` of any depth, here two layers::

    M(x; W) = act(x W1) W2            residual_norm: M(x) = x + (1 + γ) ⊙ LayerNorm(act(x W1) W2)
    ℓ_t(W)  = ‖M(k_t; W) − v_t‖²      summed over features; g_t = ∇ℓ_t(W̄), clipped to max_grad_norm

Token steps::

    S_t = η_t S_{t−1} − θ_t g_t       W_t = (1 − α_t) W_{t−1} + α_t W_init + S_t   y_t = M(q_t; W_t)

``W̄``, the anchor, is ``W`` at the start of the current chunk; ``W_init`` is 0 unless given. Chunk
steps apply η and α once per chunk, and a token reads the memory as it was at the start of its
chunk::

    S_C = η S_0 − Σ θ_s g_s           W_C = (1 − α) W_0 + α W_init + S_C         y_t = M(q_t; W_0)

These are :func:`recurrence`. What the backends compute is its closed form: inside a chunk, with
``a = 1 − α`` and the products ``A_ts = a_{s+1} … a_t``, ``E_ts = η_{s+1} … η_t``::

    W_t = β_t W_0 + f_t S_0 − Σ_{s≤t} w_ts θ_s g_s + (1 − β_t) W_init
    S_t = ε_t S_0           − Σ_{s≤t} E_ts θ_s g_s
    β_t = a_1 … a_t      ε_t = η_1 … η_t      w = A E      f = A ε

Each ``g_s`` is of rank one per layer, ``x_s ⊗ δ_s``, so nothing of size tokens × parameters exists.
Everything is products, never a logarithm or a quotient: η = 0 and α = 1 are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .call import MemoryCall, bounds_of, n_chunks
from .network import RMS_NORM_EPS, memory_network
from .state import MemoryState, MomentumScan, NeuralMemoryOutput, ReadParams

# --- the memory -----------------------------------------------------------------------------------


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    state: MemoryState,
    **options: Any,
) -> NeuralMemoryOutput:
    """The memory, written and read token by token; :func:`mal_kernels.ops.neural_memory`.

    The gradient of the inner loss comes from ``torch.func.grad`` of the loss as written.

    Args:
        q: ``[B, T, H, D]``.
        k: ``[B, T, H, D]``.
        v: ``[B, T, H, D]``.
        lr: ``[B, T, H]``.
        momentum: ``[B, T, H]``, with chunk steps one a chunk; None is zero.
        decay: like ``momentum``.
        state: one row of fast weights per sequence.
        options: the keyword arguments of the op.
    """
    call = MemoryCall.of((q, k, v, lr, momentum, decay), state, **options)
    rows, first_gate = [], 0
    for row, (b, begin, end) in enumerate(bounds_of(k, call.cu_seqlens)):
        n_gates = end - begin if call.step == "token" else n_chunks(end - begin, call.chunk_size)
        tokens = [x[b, begin:end] for x in (q, k, v, lr)]
        here, zero = slice(first_gate, first_gate + n_gates), lr.new_zeros(n_gates, lr.shape[2])
        tokens += [zero if gate is None else gate[b, here] for gate in (momentum, decay)]
        if call.cu_seqlens is not None:
            first_gate += n_gates
        rows.append(_row_recurrence(call, row, *tokens))
    outputs, states, surprises = zip(*rows, strict=True)
    new = MemoryState.cat(states)
    output, surprise = (
        rearrange(torch.cat(x), "(b t) ... -> b t ...", b=len(k)) for x in (outputs, surprises)
    )
    return NeuralMemoryOutput(
        output.to(q.dtype), new if call.keeps_position else new.end_chunk(), surprise
    )


def _row_recurrence(call: MemoryCall, row: int, *tokens: Tensor) -> NeuralMemoryOutput:
    """One row: ``q, k, v`` ``[T, H, D]``, gates ``[T or NC, H]``, fast weights ``[H, ...]``."""
    q, k, v, lr, momentum, decay = (x.to(call.weights[0].dtype) for x in tokens)
    weights, trace = ([w[row] for w in field] for field in (call.weights, call.trace))
    anchor = [w[row] for w in call.anchor] or weights
    target = [w[row] for w in call.init] or [torch.zeros_like(w) for w in weights]
    position = 0 if call.position is None else int(call.position[row])
    size = call.chunk_size or max(len(k), 1)

    def read(w: Sequence[Tensor], x: Tensor) -> Tensor:
        """``x`` ``[..., D]`` as a sequence of one token."""
        x = rearrange(x, "... d -> ... 1 d")
        y = memory_network(w, x, call.activation, call.residual_norm)
        return rearrange(y, "... 1 d -> ... d")

    def loss(w: list[Tensor], key: Tensor, value: Tensor) -> Tensor:
        return ((read(w, key) - value) ** 2).sum()

    def advance(eta: Tensor, alpha: Tensor, steps: list[Tensor]) -> tuple[list[Tensor], ...]:
        """S ← η S + step, then W ← (1 − α) W + α W_init + S."""
        s = [_per_head(eta, u) * s + u for s, u in zip(trace, steps, strict=True)]
        pull = [_per_head(alpha, w) for w in weights]
        layers = zip(weights, target, s, pull, strict=True)
        return [(1 - a) * w + a * w_init + s for w, w_init, s, a in layers], s

    outputs, surprises = [q[:0]], [lr[:0]]
    summed = [torch.zeros_like(w) for w in weights]
    for t in range(len(k)):
        if position == 0:
            anchor = weights
        grads, surprise = torch.func.vmap(torch.func.grad_and_value(loss))(anchor, k[t], v[t])
        if call.max_grad_norm is not None:
            square = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)  # [H]
            scale = call.max_grad_norm * square.clamp(min=call.max_grad_norm**2).rsqrt()
            grads = [_per_head(scale, g) * g for g in grads]
        steps = [-_per_head(lr[t], g) * g for g in grads]
        if call.step == "token":
            weights, trace = advance(momentum[t], decay[t], steps)
            outputs.append(read(weights, q[t]).unsqueeze(0))
        else:
            outputs.append(read(anchor, q[t]).unsqueeze(0))
            summed = [total + u for total, u in zip(summed, steps, strict=True)]
            if position == size - 1 or t == len(k) - 1:
                weights, trace = advance(momentum[t // size], decay[t // size], summed)
                summed = [torch.zeros_like(w) for w in weights]
        surprises.append(surprise.unsqueeze(0))
        position = (position + 1) % size
    new = MemoryState(
        tuple(w.unsqueeze(0) for w in weights),
        tuple(s.unsqueeze(0) for s in trace),
        tuple(w.unsqueeze(0) for w in anchor),
        torch.tensor([position], device=k.device),
    )
    return NeuralMemoryOutput(torch.cat(outputs), new, torch.cat(surprises))


# --- the other ops --------------------------------------------------------------------------------


def memory_read(
    q: Tensor,
    state: MemoryState,
    *,
    activation: str = "gelu",
    residual_norm: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``M(q; W)`` of every token; :func:`mal_kernels.ops.memory_read`."""
    read = []
    for row, (b, begin, end) in enumerate(bounds_of(q, cu_seqlens)):
        weights = [w[row] for w in state.weights]
        for t in range(begin, end):
            x = rearrange(q[b, t].to(weights[0].dtype), "h d -> h 1 d")
            read.append(memory_network(weights, x, activation, residual_norm))
    if not read:
        return q.clone()  # nothing, and autograd may ask for its gradient
    return rearrange(read, "(b t) h 1 d -> b t h d", b=len(q)).to(q.dtype)


def aligned_residual_read(
    hidden: Tensor,
    token_index: Tensor,
    state_index: Tensor,
    state: MemoryState,
    params: ReadParams,
    *,
    activation: str = "gelu",
    residual_norm: bool = False,
) -> Tensor:
    """The read at some tokens, added; :func:`mal_kernels.ops.aligned_residual_read`."""
    dtype, heads = state.weights[0].dtype, state.weights[0].shape[1]
    norm, w_q, w_gate, w_out = (p.to(dtype) for p in params)
    rows = [*rearrange(hidden, "b s m -> (b s) m")]
    for t, row in zip(token_index.tolist(), state_index.tolist(), strict=True):
        x = rearrange(rows[t].to(dtype), "m -> 1 m")
        normed = x * (x.square().mean() + RMS_NORM_EPS).rsqrt() * norm
        q = F.normalize(rearrange(normed @ w_q.mT, "1 (h d) -> h 1 d", h=heads), dim=-1)
        y = memory_network([w[row] for w in state.weights], q, activation, residual_norm)
        gated = rearrange(y, "h 1 d -> 1 (h d)") * F.silu(normed @ w_gate.mT)
        rows[t] = (x + gated @ w_out.mT)[0].to(hidden.dtype)
    return rearrange(rows, "(b s) m -> b s m", b=len(hidden))


def momentum_scan(
    update: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    state: MemoryState | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> MomentumScan:
    """``S_t = η_t S_{t−1} + u_t``, ``W_t = (1 − α_t) W_{t−1} + S_t``; the op of the same name."""
    dtype = torch.promote_types(update.dtype, torch.float32)
    zero = update.new_zeros(update.shape[:3])
    eta, alpha = ((zero if g is None else g).to(dtype) for g in (momentum, decay))
    weights, trace = [], []
    for row, (b, begin, end) in enumerate(bounds_of(update, cu_seqlens)):
        w = s = update.new_zeros(update.shape[2:], dtype=dtype)
        if state is not None:
            w, s = state.weights[0][row], state.momentum[0][row]
        for t in range(begin, end):
            s = _per_head(eta[b, t], s) * s + update[b, t].to(dtype)
            w = (1 - _per_head(alpha[b, t], w)) * w + s
            weights.append(w)
            trace.append(s)
    if not weights:
        return MomentumScan(update.to(dtype, copy=True), update.to(dtype, copy=True))
    return MomentumScan(
        *(rearrange(x, "(b t) h ... -> b t h ...", b=len(update)) for x in (weights, trace))
    )


def _per_head(gate: Tensor, like: Tensor) -> Tensor:
    """``gate`` with trailing dimensions of 1 up to the rank of ``like``."""
    return gate.view(*gate.shape, *(1,) * (like.ndim - gate.ndim))
