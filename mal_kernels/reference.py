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

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import n_chunks
from .grid import Grid, bounds_of
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


Weights: TypeAlias = tuple[Tensor, ...]  # one tensor per layer
# weights, momentum and anchor, rows and heads in one dimension G = N · H
_Folded: TypeAlias = tuple[Weights, Weights, Weights]
# of one chunk: weights and momentum after it, surprise, and the output if there is one
_Advanced: TypeAlias = tuple[Weights, Weights, Tensor, tuple[Tensor, ...]]


class _Memory(NamedTuple):
    """The choices that make a memory, constant over a call."""

    activation: str
    residual_norm: bool
    max_grad_norm: float | None = None
    step: str = "token"


# --- the memory network ---------------------------------------------------------------------


def _silu_backward(d: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)  # aten's own silu_backward has no derivative
    return d * s * (1 + z * (1 - s))


# act(z), and act'(z) ⊙ d as a function of d and z
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
    "silu": (F.silu, _silu_backward),
    "relu": (F.relu, lambda d, z: torch.ops.aten.threshold_backward(d, z, 0)),
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
    bounds = bounds_of(k, cu_seqlens)
    gates = _none_to_zero(k, lr, momentum, decay, step, bounds, chunk_size)
    rows, first_gate = [], 0
    for row, (b, begin, end) in enumerate(bounds):
        n_gates = end - begin if step == "token" else n_chunks(end - begin, chunk_size)
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
    dtype = state.weights[0].dtype
    grid = Grid.of(k, bounds_of(k, cu_seqlens), state.position, chunk_size)
    chunks = _Chunks.of(grid, memory, dtype, q, k, v, lr, momentum, decay)
    weights, trace, anchor = state_at = _folded(state)
    outputs: list[Tensor] = []
    surprises: list[Tensor] = []
    for start, result in _walk(grid, memory, state_at, _fold(init or ()), chunks):
        anchor, (weights, trace, surprise, output) = start[2], result
        surprises.append(surprise)
        outputs += output
    weights, trace, anchor = (tuple(map(grid.per_row, x)) for x in (weights, trace, anchor))
    new = MemoryState(weights, trace)
    if keeps_position(k.shape[1], state.position, cu_seqlens, chunk_size, step):
        new = new._replace(anchor=anchor, position=grid.position)
    y = k.new_empty(0) if q is None else grid.unpack(outputs, q)
    return NeuralMemoryOutput(y, new, grid.unpack(surprises, lr.to(dtype)))


def neural_memory_backward(
    grads: NeuralMemoryOutput,
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
) -> list[Tensor]:
    """Vector-Jacobian product of :func:`neural_memory`, one chunk at a time.

    Walks forward once for the state at the start of every chunk, then backward, recomputing a chunk
    before it is differentiated: what is alive is one state per chunk and the activations of one.
    ``grads`` are those of every output; the other arguments are those of the forward call.

    Returns:
        Gradients of the six inputs, then of the weights, momentum and anchor of ``state`` and of
        ``init``, those left out that are absent.
    """
    memory = _Memory(activation, residual_norm, max_grad_norm, step)
    dtype, target = state.weights[0].dtype, _fold(init or ())
    grid = Grid.of(k, bounds_of(k, cu_seqlens), state.position, chunk_size)
    inputs = (q, k, v, lr, momentum, decay)

    def prepare(*given: Tensor) -> _Chunks:
        rest = iter(given)
        every: list[Any] = [None if x is None else next(rest) for x in inputs]
        return _Chunks.of(grid, memory, dtype, *every)

    chunks, prepare_vjp = torch.func.vjp(prepare, *(x for x in inputs if x is not None))[:2]
    walk = _walk(grid, memory, _folded(state), target, chunks.without_queries())
    starts = [start for start, _ in walk]

    d_weights, d_trace = (_fold(x) for x in grads.state[:2])
    zeros = tuple(map(torch.zeros_like, d_weights))
    d_anchor = _fold(grads.state.anchor or ()) or zeros
    d_init = tuple(map(torch.zeros_like, target))
    d_surprise = grid.pack(grads.surprise.to(dtype))
    d_output = [] if q is None else [grid.pack(grads.output.to(dtype))]
    d_chunks: list[list[Any]] = []
    for c, chunk in reversed(list(enumerate(chunks.each()))):
        advance = functools.partial(_advance, memory)
        vjp = torch.func.vjp(advance, *starts[c], target, *chunk)[1]
        d_result = (d_weights, d_trace, d_surprise[c], tuple(d[c] for d in d_output))
        d_weights, d_trace, d_a, d_i, *d_chunk = vjp(d_result)
        d_chunks.insert(0, d_chunk)
        d_anchor, d_init = _add(d_anchor, d_a), _add(d_init, d_i)
        # where a row opened the chunk, its anchor was the weights at the start
        opens = grid.opens[c]
        opened = d_anchor if opens is None else _where(opens, d_anchor, zeros)
        d_anchor = zeros if opens is None else _where(opens, zeros, d_anchor)
        d_weights = _add(d_weights, opened)
    if state.anchor is None:
        d_weights, d_anchor = _add(d_weights, d_anchor), ()
    d_inputs = prepare_vjp(chunks.stacked(d_chunks))
    return [*d_inputs, *map(grid.per_row, (*d_weights, *d_trace, *d_anchor, *d_init))]


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


class _Chunks(NamedTuple):
    """All chunks of a call; the first dimension of every tensor counts them."""

    tokens: tuple[Tensor, ...]  # k, v, and q if it reads, [chunks, G, C, D]
    coefficients: _TokenSteps | _ChunkStep

    @classmethod
    def of(
        cls,
        grid: Grid,
        memory: _Memory,
        dtype: torch.dtype,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        momentum: Tensor | None,
        decay: Tensor | None,
    ) -> _Chunks:
        tokens = tuple(grid.pack(x.to(dtype)) for x in (k, v, q) if x is not None)
        theta, by_token = grid.pack(lr.to(dtype)), memory.step == "token"
        pack = grid.pack if by_token else grid.pack_chunk_gate
        absent = torch.zeros_like(theta if by_token else theta[..., 0])
        eta, alpha = (absent if g is None else pack(g.to(dtype)) for g in (momentum, decay))
        if by_token:
            return cls(tokens, _TokenSteps.of(theta, eta, alpha, grid.mask, every=q is not None))
        return cls(tokens, _ChunkStep.of(theta, eta, alpha, grid.mask))

    def each(self) -> Iterator[tuple[tuple[Tensor, ...], _TokenSteps | _ChunkStep]]:
        """Tokens and coefficients of one chunk after the other."""
        tokens = zip(*(x.unbind() for x in self.tokens), strict=True)
        coefficients = zip(*(x.unbind() for x in self.coefficients), strict=True)
        return zip(tokens, map(type(self.coefficients)._make, coefficients), strict=True)

    def without_queries(self) -> _Chunks:
        """The same for a walk that only writes."""
        return self._replace(tokens=self.tokens[:2])

    def stacked(self, parts: Sequence[Sequence[Any]]) -> _Chunks:
        """The inverse of :meth:`each`."""

        def stack(whole: Sequence[Tensor], parts: list[Sequence[Tensor]]) -> list[Tensor]:
            if not parts:
                return [torch.zeros_like(x) for x in whole]
            return [torch.stack(x) for x in zip(*parts, strict=True)]

        tokens = stack(self.tokens, [tokens for tokens, _ in parts])
        coefficients = stack(self.coefficients, [c for _, c in parts])
        return _Chunks(tuple(tokens), type(self.coefficients)._make(coefficients))


def _walk(
    grid: Grid, memory: _Memory, state: _Folded, init: Weights, chunks: _Chunks
) -> Iterator[tuple[_Folded, _Advanced]]:
    """Weights, momentum and anchor at the start of every chunk, and the result of the chunk."""
    weights, trace, anchor = state
    for opens, chunk in zip(grid.opens, chunks.each(), strict=True):
        anchor = weights if opens is None else _where(opens, weights, anchor)
        start = (weights, trace, anchor)
        result = _advance(memory, *start, init, *chunk)
        weights, trace = result[:2]
        yield start, result


def _advance(
    memory: _Memory,
    weights: Weights,
    trace: Weights,
    anchor: Weights,
    init: Weights,
    tokens: tuple[Tensor, ...],
    c: _TokenSteps | _ChunkStep,
) -> _Advanced:
    """One chunk of all rows: weights and momentum after it, surprise, output if it reads."""
    k, v, *queries = tokens
    xs, deltas, surprise = _gradient_factors(anchor, k, v, memory)
    if isinstance(c, _TokenSteps):
        outputs = [_read_inside(q, weights, trace, init, xs, deltas, c, memory) for q in queries]
    else:
        act, norm = memory.activation, memory.residual_norm
        outputs = [memory_network(weights, q, act, norm) for q in queries]
    return *_write(weights, trace, init, xs, deltas, c), surprise, tuple(outputs)


def _gradient_factors(
    anchor: Sequence[Tensor], k: Tensor, v: Tensor, memory: _Memory
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """``x_s`` and ``δ_s`` of every layer with ``g_s = x_s ⊗ δ_s``, and the surprise ``[G, C]``.

    With ``residual_norm`` the gradient of γ, a plain vector, stands last among the ``δ``.
    """
    act, act_backward = ACTIVATIONS[memory.activation]
    layers = anchor[:-1] if memory.residual_norm else anchor
    xs, zs = [k], [k @ layers[0]]
    for w in layers[1:]:
        xs.append(act(zs[-1]))
        zs.append(xs[-1] @ w)
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
        deltas.insert(0, act_backward(deltas[0] @ w.mT, z))
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


class _TokenSteps(NamedTuple):
    """Rows ``t`` of the closed form: ``R = C`` of them where tokens read, else the last alone."""

    w: Tensor  # [G, R, C], w_ts θ_s
    beta: Tensor  # [G, R]
    f: Tensor  # [G, R]
    e_last: Tensor  # [G, C], E_Cs θ_s
    e0_last: Tensor  # [G]

    @classmethod
    def of(
        cls, lr: Tensor, momentum: Tensor, decay: Tensor, mask: Tensor | None, *, every: bool
    ) -> _TokenSteps:
        """From gates ``[..., C]``.

        Where ``mask`` ``[..., C]`` is False no token stands: that slot neither decays nor adds S to
        W.
        """
        eta, a = momentum, 1 - decay
        if mask is not None:
            eta, a = (torch.where(mask, gate, 1.0) for gate in (eta, a))
        rows = slice(None) if every else slice(-1, None)
        decays = _segment_products(a)[..., rows, :]
        if mask is not None:
            decays = decays * mask.unsqueeze(-2)
        momenta = _segment_products(eta)
        e0 = eta.cumprod(-1)
        f = (decays @ e0.unsqueeze(-1)).squeeze(-1)
        beta = a.cumprod(-1)[..., rows]
        w, e_last = (decays @ momenta) * lr.unsqueeze(-2), momenta[..., -1, :] * lr
        return cls(w, beta, f, e_last, e0[..., -1])

    def after_the_last(self) -> tuple[Tensor, Tensor, Tensor]:
        """β, f and ε ``[G]`` of the chunk's last token."""
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


class _ChunkStep(NamedTuple):
    """One step for the whole chunk: ``w = E = 1``, ``β = 1 − α``, ``f = ε = η``."""

    lr: Tensor  # [G, C], 0 where no token stands
    beta: Tensor  # [G]
    f: Tensor  # [G]
    e0_last: Tensor  # [G]

    @classmethod
    def of(cls, lr: Tensor, momentum: Tensor, decay: Tensor, mask: Tensor | None) -> _ChunkStep:
        """From gates ``[...]``; a row without tokens in the chunk keeps its state."""
        if mask is None:
            return cls(lr, 1 - decay, momentum, momentum)
        active = mask.any(-1)
        gates = ((1 - decay, 1.0), (momentum, 0.0), (momentum, 1.0))
        return cls(lr, *(torch.where(active, gate, idle) for gate, idle in gates))

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


def _segment_products(gate: Tensor) -> Tensor:
    """``P_ts = gate_{s+1} … gate_t`` for t ≥ s, else 0: 1-semiseparable, ``[..., C, C]``."""
    size = gate.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=gate.device).tril(-1)
    return torch.where(below, gate.unsqueeze(-1), 1.0).cumprod(-2).tril()


def _write(
    weights: Weights,
    trace: Weights,
    init: Weights,
    xs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    c: _TokenSteps | _ChunkStep,
) -> tuple[Weights, Weights]:
    """The closed form at the last token: new weights and new momentum."""
    gates = c.after_the_last()
    new_weights, new_trace = [], []
    for i, (w, s, delta) in enumerate(zip(weights, trace, deltas, strict=True)):
        beta, f, e0 = (_per_head(gate, w) for gate in gates)
        kept = torch.addcmul(beta * w, f, s)
        if init:
            kept = torch.addcmul(kept, 1 - beta, init[i])
        w, s = c.descend(kept, e0 * s, xs[i] if i < len(xs) else None, delta)
        new_weights.append(w)
        new_trace.append(s)
    return tuple(new_weights), tuple(new_trace)


def _read_inside(
    q: Tensor,
    weights: Weights,
    trace: Weights,
    init: Weights,
    xs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    c: _TokenSteps,
    memory: _Memory,
) -> Tensor:
    """``y_t = M(q_t; W_t)`` for every token of the chunk without forming any ``W_t``."""
    act = ACTIVATIONS[memory.activation][0]
    beta, f = c.beta.unsqueeze(-1), c.f.unsqueeze(-1)

    def layer(i: int, h: Tensor) -> Tensor:
        """``h_t`` times the weights of layer ``i`` at token t."""
        z = torch.addcmul(beta * (h @ weights[i]), f, h @ trace[i])
        if init:
            z = torch.addcmul(z, 1 - beta, h @ init[i])
        return torch.baddbmm(z, c.w * (h @ xs[i].mT), deltas[i], alpha=-1)

    z = layer(0, q)
    for i in range(1, len(xs)):
        z = layer(i, act(z))
    if not memory.residual_norm:
        return z
    gain = 1 + beta * weights[-1].unsqueeze(-2) + f * trace[-1].unsqueeze(-2) - c.w @ deltas[-1]
    if init:
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
    grid = Grid.of(q, bounds_of(q, cu_seqlens), None, None)
    weights = _fold(state.weights)
    return grid.unpack(
        [memory_network(weights, p, activation, residual_norm) for p in grid.pack(x)], q
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
        n = sum(n_chunks(e - b, chunk_size) for _, b, e in bounds) // max(k.shape[0], 1)
    zero = lr.new_zeros(k.shape[0], n, k.shape[2])
    return [zero if g is None else g for g in (momentum, decay)]


def _folded(state: MemoryState) -> _Folded:
    return _fold(state.weights), _fold(state.momentum), _fold(state.anchor or state.weights)


def _fold(layers: Sequence[Tensor]) -> Weights:
    """``[N, H, ...]`` to ``[G, ...]``."""
    return tuple(w.flatten(0, 1) for w in layers)


def _add(a: Weights, b: Weights) -> Weights:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _where(rows: Tensor, a: Weights, b: Weights) -> Weights:
    """Row-wise choice between two lists of weights; ``rows`` ``[G]`` bool."""
    pairs = zip(a, b, strict=True)
    return tuple(torch.where(rows.view(-1, *(1,) * (x.ndim - 1)), x, y) for x, y in pairs)


def _per_head(gate: Tensor, like: Tensor) -> Tensor:
    """``gate`` with trailing dimensions of 1 up to the rank of ``like``."""
    return gate.view(*gate.shape, *(1,) * (like.ndim - gate.ndim))
