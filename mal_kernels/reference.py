"""The definition: what every op computes, in plain PyTorch, on any device and in any float dtype.

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

:func:`recurrence` is that, token by token. The other functions are its closed form: inside a
chunk, with ``a = 1 − α`` and the products ``A_ts = a_{s+1} … a_t``, ``E_ts = η_{s+1} … η_t``::

    W_t = β_t W_0 + f_t S_0 − Σ_{s≤t} w_ts θ_s g_s + (1 − β_t) W_init
    S_t = ε_t S_0           − Σ_{s≤t} E_ts θ_s g_s
    β_t = a_1 … a_t      ε_t = η_1 … η_t      w = A E      f = A ε

Each ``g_s`` is of rank one per layer, ``x_s ⊗ δ_s``, so nothing of size tokens × parameters exists.
Everything is products, never a logarithm or a quotient: η = 0 and α = 1 are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import MemoryState

LAYER_NORM_EPS = 1e-5  # of residual_norm
RMS_NORM_EPS = 1e-6  # of the hidden states in aligned_residual_read


class MemoryUpdate(NamedTuple):
    """What a write returns: ``state`` and ``surprise`` ``‖M(k_t; W̄) − v_t‖²`` ``[B, T, H]``."""

    state: MemoryState
    surprise: Tensor


class NeuralMemoryOutput(NamedTuple):
    """What the layer returns: ``output`` ``[B, T, H, D]``, ``state`` and ``surprise``."""

    output: Tensor
    state: MemoryState
    surprise: Tensor


class MomentumScan(NamedTuple):
    """``weights`` and ``momentum`` after every token, both ``[B, T, H, ...]``."""

    weights: Tensor
    momentum: Tensor


class ReadParams(NamedTuple):
    """Parameters of :func:`aligned_residual_read`: ``Dm`` hidden features, ``H`` heads of ``D``.

    ``norm`` ``[Dm]``, ``w_q`` and ``w_gate`` ``[H·D, Dm]``, ``w_out`` ``[Dm, H·D]``.
    """

    norm: Tensor
    w_q: Tensor
    w_gate: Tensor
    w_out: Tensor


class _Memory(NamedTuple):
    """The choices that make a memory, constant over a call."""

    activation: str
    residual_norm: bool
    max_grad_norm: float | None = None
    step: str = "token"


# --- the memory network ---------------------------------------------------------------------


def _gelu_derivative(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (z + k * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * k * z * z)


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, _gelu_derivative),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), _gelu_tanh_derivative),
    "silu": (F.silu, _silu_derivative),
    "relu": (F.relu, lambda z: (z > 0).to(z.dtype)),
}


def memory_network(
    weights: Sequence[Tensor], x: Tensor, activation: str = "gelu", residual_norm: bool = False
) -> Tensor:
    """``M(x; W)``: ``x`` ``[..., T, D]``, weights ``[..., d_in, d_out]``, γ ``[..., D]`` last."""
    act = ACTIVATIONS[activation][0]
    layers = weights[:-1] if residual_norm else weights
    h = x @ layers[0]
    for w in layers[1:]:
        h = act(h) @ w
    if not residual_norm:
        return h
    return x + (1 + weights[-1].unsqueeze(-2)) * F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)


# --- the token-by-token recurrence: the golden ----------------------------------------------


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    state: MemoryState,
    *,
    chunk_size: int | None = None,
    step: str = "token",
    activation: str = "gelu",
    residual_norm: bool = False,
    max_grad_norm: float | None = None,
    init: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> NeuralMemoryOutput:
    """Same arguments and results as :func:`neural_memory`, as a loop over rows and tokens.

    The gradient comes from ``torch.func.grad`` of the loss as written; no closed form is shared
    with the functions below, so that each checks the other. Slow; differentiable.
    """
    memory = _Memory(activation, residual_norm, max_grad_norm, step)
    bounds = _bounds(k, cu_seqlens)
    gates = _none_to_zero(k, lr, momentum, decay, step, bounds, chunk_size)
    rows, first_gate = [], 0
    for row, (b, begin, end) in enumerate(bounds):
        n_gates = end - begin if step == "token" else _n_chunks(end - begin, chunk_size)
        tokens = [x[b, begin:end] for x in (q, k, v, lr)]
        row_gates = [g[b, first_gate : first_gate + n_gates] for g in gates]
        if cu_seqlens is not None:
            first_gate += n_gates
        rows.append(_row_recurrence(memory, tokens, row_gates, state, row, chunk_size, init))
    outputs, states, surprises = zip(*rows, strict=True)
    new = MemoryState.cat(states)
    if not keeps_position(k.shape[1], state.position, cu_seqlens, chunk_size, step):
        new = new.end_chunk()
    output, surprise = (
        torch.stack(x) if cu_seqlens is None else torch.cat(x).unsqueeze(0)
        for x in (outputs, surprises)
    )
    return NeuralMemoryOutput(output.to(q.dtype), new, surprise)


def _row_recurrence(
    memory: _Memory,
    tokens: Sequence[Tensor],
    gates: Sequence[Tensor],
    state: MemoryState,
    row: int,
    chunk_size: int | None,
    init: Sequence[Tensor] | None,
) -> NeuralMemoryOutput:
    """One row: ``q, k, v`` ``[T, H, D]``, gates ``[T or NC, H]``, fast weights ``[H, ...]``."""
    dtype = state.weights[0].dtype
    q, k, v, lr, momentum, decay = (x.to(dtype) for x in (*tokens, *gates))
    weights, trace = ([w[row] for w in field] for field in state[:2])
    anchor = weights if state.anchor is None else [w[row] for w in state.anchor]
    target = [torch.zeros_like(w) for w in weights] if init is None else [w[row] for w in init]
    position = 0 if state.position is None else int(state.position[row])
    size = chunk_size or max(len(k), 1)

    def read(w: Sequence[Tensor], x: Tensor) -> Tensor:
        """``x`` ``[..., D]`` as a sequence of one token."""
        out = memory_network(w, x.unsqueeze(-2), memory.activation, memory.residual_norm)
        return out.squeeze(-2)

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
        if memory.max_grad_norm is not None:
            square = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)
            scale = memory.max_grad_norm * square.clamp(min=memory.max_grad_norm**2).rsqrt()
            grads = [_per_head(scale, g) * g for g in grads]
        steps = [-_per_head(lr[t], g) * g for g in grads]
        if memory.step == "token":
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


# --- the closed form, chunk by chunk --------------------------------------------------------


def neural_memory(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    state: MemoryState,
    *,
    chunk_size: int | None = None,
    step: str = "token",
    activation: str = "gelu",
    residual_norm: bool = False,
    max_grad_norm: float | None = None,
    init: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> NeuralMemoryOutput:
    """The loop over chunks. Arguments and results: :func:`mal_kernels.ops.neural_memory`.

    ``q=None`` writes only, as :func:`mal_kernels.ops.memory_update` does; ``output`` is then empty.
    """
    memory = _Memory(activation, residual_norm, max_grad_norm, step)
    dtype, bounds = state.weights[0].dtype, _bounds(k, cu_seqlens)
    grid = _Grid.of(k, bounds, state.position, chunk_size)
    momentum, decay = _none_to_zero(k, lr, momentum, decay, step, bounds, chunk_size)
    tokens = [grid.pack(x.to(dtype)) for x in (k, v, lr, *([] if q is None else [q]))]
    pack_gate = grid.pack if step == "token" else grid.pack_chunk_gate
    gates = [pack_gate(g.to(dtype)) for g in (momentum, decay)]
    init = tuple(init or ())

    n = len(state.weights)
    weights, trace = state.weights, state.momentum
    anchor = state.weights if state.anchor is None else state.anchor
    outputs, surprises = [], []
    for c in range(grid.chunks):
        opens = grid.opens[c]
        anchor = weights if opens is None else _where(opens, weights, anchor)
        chunk = _Chunk(memory, n, len(init), grid.mask[c], q is not None)
        inputs = (x[c] for x in (*tokens[:3], *gates, *tokens[3:]))
        out = _Recompute.apply(  # type: ignore[no-untyped-call]
            chunk, *weights, *trace, *anchor, *init, *inputs
        )
        weights, trace = out[:n], out[n : 2 * n]
        surprises.append(out[2 * n])
        outputs += out[2 * n + 1 :]

    surprise = grid.unpack(surprises, lr.to(dtype))
    output = k.new_empty(0) if q is None else grid.unpack(outputs, q)
    new = MemoryState(tuple(weights), tuple(trace))
    if keeps_position(k.shape[1], state.position, cu_seqlens, chunk_size, step):
        new = new._replace(anchor=tuple(anchor), position=grid.position)
    return NeuralMemoryOutput(output, new, surprise)


def keeps_position(
    tokens: int,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    step: str,
) -> bool:
    """Whether a call may stop inside a chunk: then its state has ``anchor`` and ``position``."""
    if step == "chunk" or chunk_size is None:
        return False
    return position is not None or cu_seqlens is not None or tokens % chunk_size != 0


class _Recompute(torch.autograd.Function):
    """Calls ``fn(*tensors)`` and keeps its inputs only: backward recomputes.

    So the activations of one chunk at a time are alive. Unlike ``torch.utils.checkpoint`` this
    works under ``torch.func``.
    """

    @staticmethod
    def forward(fn: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return fn(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fn = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        vjp = torch.func.vjp(ctx.fn, *ctx.saved_tensors)[1]
        return None, *vjp(grads)


class _Chunk(NamedTuple):
    """One chunk of all rows as a function of tensors alone, returning the state after it."""

    memory: _Memory
    n_weights: int
    n_init: int
    mask: Tensor  # [N, C], False where the grid holds no token
    reads: bool

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        n, memory, m = self.n_weights, self.memory, 3 * self.n_weights + self.n_init
        weights, trace, anchor = (tensors[i * n : (i + 1) * n] for i in range(3))
        init = tensors[3 * n : m] or None
        k, v, lr, momentum, decay, *q = tensors[m:]  # [N, H, C, D] and [N, H, C]
        xs, deltas, surprise = _gradient_factors(anchor, k, v, memory)
        deltas = [lr.unsqueeze(-1) * d for d in deltas]
        if memory.step == "token":
            c = _token_coefficients(momentum, decay, self.mask.unsqueeze(1), every=self.reads)
        else:
            c = _chunk_coefficients(momentum, decay, self.mask)
        outputs = []
        if self.reads and memory.step == "token":
            outputs = [_read_inside(q[0], weights, trace, init, xs, deltas, c, memory)]
        elif self.reads:
            outputs = [memory_network(weights, q[0], memory.activation, memory.residual_norm)]
        new = _write(weights, trace, init, xs, deltas, c)
        return (*new, surprise, *outputs)


def _gradient_factors(
    anchor: Sequence[Tensor], k: Tensor, v: Tensor, memory: _Memory
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """``x_s`` and ``δ_s`` of every layer with ``g_s = x_s ⊗ δ_s``, and the surprise ``[N, H, C]``.

    With ``residual_norm`` the gradient of γ, a plain vector, stands last among the ``δ``.
    """
    act, derivative = ACTIVATIONS[memory.activation]
    layers = anchor[:-1] if memory.residual_norm else anchor
    zs = [k @ layers[0]]
    for w in layers[1:]:
        zs.append(act(zs[-1]) @ w)
    xs = [k, *(act(z) for z in zs[:-1])]
    if memory.residual_norm:
        mean = zs[-1].mean(-1, keepdim=True)
        var = zs[-1].var(-1, keepdim=True, correction=0)
        inverse_std = torch.rsqrt(var + LAYER_NORM_EPS)
        normed = (zs[-1] - mean) * inverse_std
        gain = 1 + anchor[-1].unsqueeze(-2)
        error = k + gain * normed - v
        d_gamma, d = 2 * error * normed, 2 * error * gain
        projected = (d * normed).mean(-1, keepdim=True)
        delta = inverse_std * (d - d.mean(-1, keepdim=True) - normed * projected)
    else:
        error = zs[-1] - v
        delta = 2 * error
    deltas = [delta]
    for w, z in zip(reversed(layers[1:]), reversed(zs[:-1]), strict=True):
        deltas.insert(0, (deltas[0] @ w.mT) * derivative(z))
    if memory.residual_norm:
        deltas.append(d_gamma)
    return xs, _clip(xs, deltas, memory.max_grad_norm), (error * error).sum(-1)


def _clip(xs: Sequence[Tensor], deltas: list[Tensor], max_norm: float | None) -> list[Tensor]:
    """Scales every token's gradient to norm ≤ max_norm; ``‖g_s‖² = Σ_layers ‖x_s‖² ‖δ_s‖²``."""
    if max_norm is None:
        return deltas
    squares = [d.square().sum(-1) for d in deltas]
    for i, x in enumerate(xs):
        squares[i] = squares[i] * x.square().sum(-1)
    scale = max_norm * torch.stack(squares).sum(0).clamp(min=max_norm**2).rsqrt()
    return [scale.unsqueeze(-1) * d for d in deltas]


class _Coefficients(NamedTuple):
    """Rows ``t`` of the closed form: all ``C`` of them where tokens read, else the last alone."""

    w: Tensor  # [N, H, R, C]
    beta: Tensor  # [N, H, R]
    f: Tensor  # [N, H, R]
    e_last: Tensor  # [N, H, C]
    e0_last: Tensor  # [N, H]


def _token_coefficients(
    momentum: Tensor, decay: Tensor, mask: Tensor, *, every: bool
) -> _Coefficients:
    """From gates ``[N, H, C]``. A masked slot is skipped: it neither decays nor adds S to W."""
    eta = torch.where(mask, momentum, 1.0)
    a = torch.where(mask, 1 - decay, 1.0)
    rows = slice(None) if every else slice(-1, None)
    decays = (_segment_products(a) * mask.unsqueeze(-2))[..., rows, :]
    momenta = _segment_products(eta)
    e0 = eta.cumprod(-1)
    return _Coefficients(
        w=decays @ momenta,
        beta=a.cumprod(-1)[..., rows],
        f=(decays @ e0.unsqueeze(-1)).squeeze(-1),
        e_last=momenta[..., -1, :],
        e0_last=e0[..., -1],
    )


def _chunk_coefficients(momentum: Tensor, decay: Tensor, mask: Tensor) -> _Coefficients:
    """From gates ``[N, H]``: w = E = 1. A row without tokens keeps its state."""
    active = mask.any(-1, keepdim=True)
    eta = torch.where(active, momentum, 1.0)
    ones = mask.unsqueeze(1).to(momentum.dtype).expand(*momentum.shape, -1)
    return _Coefficients(
        w=ones.unsqueeze(-2),
        beta=torch.where(active, 1 - decay, 1.0).unsqueeze(-1),
        f=torch.where(active, momentum, 0.0).unsqueeze(-1),
        e_last=ones,
        e0_last=eta,
    )


def _segment_products(gate: Tensor) -> Tensor:
    """``P_ts = gate_{s+1} … gate_t`` for t ≥ s, else 0: 1-semiseparable, ``[..., C, C]``."""
    size = gate.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=gate.device).tril(-1)
    return torch.where(below, gate.unsqueeze(-1), 1.0).cumprod(-2).tril()


def _write(
    weights: Sequence[Tensor],
    trace: Sequence[Tensor],
    init: Sequence[Tensor] | None,
    xs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    c: _Coefficients,
) -> list[Tensor]:
    """The closed form at the last token: new weights, then new momentum."""
    beta, f, w = c.beta[..., -1], c.f[..., -1], c.w[..., -1, :]
    new_weights, new_trace = [], []
    for i, (weight, s, d) in enumerate(zip(weights, trace, deltas, strict=True)):
        x = xs[i] if i < len(xs) else None
        new = _per_head(beta, weight) * weight + _per_head(f, s) * s - _summed_gradient(w, x, d)
        if init is not None:
            new = new + _per_head(1 - beta, weight) * init[i]
        new_weights.append(new)
        new_trace.append(_per_head(c.e0_last, s) * s - _summed_gradient(c.e_last, x, d))
    return new_weights + new_trace


def _summed_gradient(c: Tensor, x: Tensor | None, delta: Tensor) -> Tensor:
    """``Σ_s c_s x_s ⊗ δ_s``, ``c`` ``[N, H, C]``."""
    if x is None:
        return (c.unsqueeze(-2) @ delta).squeeze(-2)
    return (x * c.unsqueeze(-1)).mT @ delta


def _read_inside(
    q: Tensor,
    weights: Sequence[Tensor],
    trace: Sequence[Tensor],
    init: Sequence[Tensor] | None,
    xs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    c: _Coefficients,
    memory: _Memory,
) -> Tensor:
    """``y_t = M(q_t; W_t)`` for every token of the chunk without forming any ``W_t``."""
    act = ACTIVATIONS[memory.activation][0]
    beta, f = c.beta.unsqueeze(-1), c.f.unsqueeze(-1)

    def layer(i: int, h: Tensor) -> Tensor:
        """``h_t`` times the weights of layer ``i`` at token t."""
        z = beta * (h @ weights[i]) + f * (h @ trace[i]) - (c.w * (h @ xs[i].mT)) @ deltas[i]
        return z if init is None else z + (1 - beta) * (h @ init[i])

    z = layer(0, q)
    for i in range(1, len(xs)):
        z = layer(i, act(z))
    if not memory.residual_norm:
        return z
    gain = 1 + beta * weights[-1].unsqueeze(-2) + f * trace[-1].unsqueeze(-2) - c.w @ deltas[-1]
    if init is not None:
        gain = gain + (1 - beta) * init[-1].unsqueeze(-2)
    return q + gain * F.layer_norm(z, z.shape[-1:], eps=LAYER_NORM_EPS)


# --- the other ops --------------------------------------------------------------------------


def momentum_scan(
    update: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    state: MemoryState | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> MomentumScan:
    """``S_t = η_t S_{t−1} + u_t``, ``W_t = (1 − α_t) W_{t−1} + S_t`` as two associative scans."""
    dtype = torch.promote_types(update.dtype, torch.float32)
    update = update.to(dtype)
    zeros = update.new_zeros(update.shape[:3])
    eta, alpha = (zeros if g is None else g.to(dtype) for g in (momentum, decay))
    first = torch.zeros_like(eta[..., 0], dtype=torch.bool)  # [B, T]: token begins its sequence
    rows = torch.arange(update.shape[0], device=update.device)
    if cu_seqlens is None:
        starts, filled = torch.zeros_like(rows), rows[: len(rows) if update.shape[1] else 0]
    else:
        filled = (cu_seqlens.diff() > 0).nonzero().squeeze(-1)
        rows, starts = torch.zeros_like(filled), cu_seqlens[filled].long()
    first[rows[: len(filled)], starts[: len(filled)]] = True
    weights, trace = (None, None) if state is None else (state.weights[0], state.momentum[0])

    def scan(gate: Tensor, x: Tensor, initial: Tensor | None) -> Tensor:
        """``y_t = gate_t y_{t−1} + x_t``; the initial value joins each sequence's first token."""
        if initial is not None:
            at = (rows[: len(filled)], starts[: len(filled)])
            x = x.index_put(at, _per_head(gate[at], initial) * initial[filled], accumulate=True)
        gate = _per_head(torch.where(first.unsqueeze(-1), 0.0, gate), x)
        return _linear_scan(gate, x)

    s = scan(eta, update, trace)
    return MomentumScan(scan(1 - alpha, s, weights), s)


def _linear_scan(gate: Tensor, x: Tensor) -> Tensor:
    """``y_t = gate_t y_{t−1} + x_t`` over dim 1 by recursive doubling: log2(T) steps."""
    shift = 1
    while shift < x.shape[1]:
        x = torch.cat([x[:, :shift], x[:, shift:] + gate[:, shift:] * x[:, :-shift]], 1)
        gate = torch.cat([gate[:, :shift], gate[:, shift:] * gate[:, :-shift]], 1)
        shift *= 2
    return x


def memory_read(
    q: Tensor,
    state: MemoryState,
    *,
    activation: str = "gelu",
    residual_norm: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``M(q; W)``, every token at the same weights. See :func:`mal_kernels.ops.memory_read`."""
    x = q.to(state.weights[0].dtype)
    if cu_seqlens is None:
        y = memory_network(state.weights, x.transpose(1, 2), activation, residual_norm)
        return y.transpose(1, 2).to(q.dtype)
    grid = _Grid.of(q, _bounds(q, cu_seqlens), None, None)
    packed = grid.pack(x)
    return grid.unpack(
        [memory_network(state.weights, p, activation, residual_norm) for p in packed], q
    )


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
    """:func:`mal_kernels.ops.aligned_residual_read`: sorts tokens by state, reads, puts back."""
    dtype, (heads, dim) = state.weights[0].dtype, state.weights[0].shape[1:3]
    order = state_index.argsort(stable=True)
    token = token_index[order]
    count = torch.bincount(state_index, minlength=state.batch_size)
    cu_seqlens = F.pad(count.cumsum(0), (1, 0))
    flat = hidden.reshape(-1, hidden.shape[-1])
    x = flat[token].to(dtype)
    norm, w_q, w_gate, w_out = (p.to(dtype) for p in params)
    normed = F.rms_norm(x, x.shape[-1:], norm, RMS_NORM_EPS)
    q = F.normalize((normed @ w_q.mT).unflatten(-1, (heads, dim)), dim=-1)
    y = memory_read(
        q.unsqueeze(0),
        state,
        activation=activation,
        residual_norm=residual_norm,
        cu_seqlens=cu_seqlens,
    )
    residual = (y.reshape(len(token), heads * dim) * F.silu(normed @ w_gate.mT)) @ w_out.mT
    return flat.index_copy(0, token, (x + residual).to(hidden.dtype)).view(hidden.shape)


# --- rows of unequal length on one grid of chunks -------------------------------------------


class _Grid(NamedTuple):
    """Tokens of all rows laid on ``[N, chunks · size]`` slots, each row shifted by its position."""

    slot: Tensor  # [B·T] int64, of each token
    rows: int
    chunks: int
    size: int
    mask: Tensor  # [chunks, N, size] bool, slot holds a token
    opens: list[Tensor | None]  # per chunk [N] bool: the row starts a chunk here; None: every row
    position: Tensor  # [N] int64, after the last token
    gate_index: Tensor  # [chunks, N] int64, the row's chunk gate in the flattened [B·NC]

    @classmethod
    def of(
        cls,
        x: Tensor,
        bounds: list[tuple[int, int, int]],
        position: Tensor | None,
        chunk_size: int | None,
    ) -> _Grid:
        lengths = torch.tensor([end - begin for _, begin, end in bounds], device=x.device)
        start = torch.zeros_like(lengths) if position is None else position
        size = chunk_size or max(int(lengths.max()), 1)
        chunks = -(-int((start + lengths).max()) // size)
        row = torch.repeat_interleave(torch.arange(len(bounds), device=x.device), lengths)
        before = (lengths.cumsum(0) - lengths)[row]
        column = torch.arange(len(row), device=x.device) - before + start[row]
        index = row * (chunks * size) + column
        mask = torch.zeros(len(bounds) * chunks * size, dtype=torch.bool, device=x.device)
        mask = mask.index_fill(0, index, True).view(len(bounds), chunks, size).transpose(0, 1)
        counts = torch.clamp(-(-lengths // size), min=1)
        chunk = torch.arange(chunks, device=x.device).unsqueeze(1)
        gate_index = (counts.cumsum(0) - counts) + torch.minimum(chunk, counts - 1)
        whole_rows = position is None and bool((lengths == lengths[:1]).all())
        opens: list[Tensor | None] = [None] * chunks
        if not whole_rows:
            opens = [m.any(-1) & ((start == 0) | (c > 0)) for c, m in enumerate(mask)]
        end = (start + lengths) % size
        return cls(index, len(bounds), chunks, size, mask, opens, end, gate_index)

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, H, ...]`` to ``[chunks, N, H, size, ...]``, zero where there is no token."""
        x = x.flatten(0, 1)
        slots = x.new_zeros(self.rows * self.chunks * self.size, *x.shape[1:])
        slots = slots.index_copy(0, self.slot, x)
        grid = slots.view(self.rows, self.chunks, self.size, *x.shape[1:])
        return grid.transpose(0, 1).transpose(2, 3)

    def pack_chunk_gate(self, gate: Tensor) -> Tensor:
        """``[B, NC, H]`` to ``[chunks, N, H]``."""
        return gate.flatten(0, 1)[self.gate_index]

    def unpack(self, chunks: list[Tensor], like: Tensor) -> Tensor:
        """The inverse of :meth:`pack`, with the shape and dtype of ``like``."""
        if not chunks:
            return torch.zeros_like(like)
        grid = torch.stack(chunks).transpose(2, 3).transpose(0, 1)
        return grid.flatten(0, 2)[self.slot].view(like.shape).to(like.dtype)


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """``(b, begin, end)`` of every sequence."""
    if cu_seqlens is None:
        return [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    marks = cu_seqlens.tolist()
    return [(0, begin, end) for begin, end in pairwise(marks)]


def _n_chunks(tokens: int, chunk_size: int | None) -> int:
    """Chunk gates of a sequence: one even when it is empty."""
    return 1 if chunk_size is None else max(1, -(-tokens // chunk_size))


def _none_to_zero(
    k: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    step: str,
    bounds: list[tuple[int, int, int]],
    chunk_size: int | None,
) -> list[Tensor]:
    """Absent momentum or decay is zero momentum or decay."""
    n = k.shape[1]
    if step == "chunk":
        n = sum(_n_chunks(e - b, chunk_size) for _, b, e in bounds) // max(k.shape[0], 1)
    zero = lr.new_zeros(k.shape[0], n, k.shape[2])
    return [zero if g is None else g for g in (momentum, decay)]


def _where(rows: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Row-wise choice between two lists of weights; ``rows`` ``[N]`` bool."""
    pairs = zip(a, b, strict=True)
    return tuple(torch.where(rows.view(-1, *(1,) * (x.ndim - 1)), x, y) for x, y in pairs)


def _per_head(gate: Tensor, like: Tensor) -> Tensor:
    """``gate`` with trailing dimensions of 1 up to the rank of ``like``."""
    return gate.view(*gate.shape, *(1,) * (like.ndim - gate.ndim))
