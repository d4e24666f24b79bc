"""The closed form of the memory, chunk by chunk, and its gradients.

Backward writes once more, keeping the state before every chunk and the chunk's factors, then walks
from the last chunk to the first. What is alive is linear in tokens and in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import MemoryCall
from .chunk import (
    Factors,
    Layers,
    Start,
    factors,
    factors_backward,
    read,
    read_backward,
    write,
    write_backward,
)
from .grid import Grid
from .memory_read import fold
from .portable import fresh, portable
from .steps import ChunkStep, TokenSteps


class _Chunks(NamedTuple):
    """All chunks of a call; the first dimension of every tensor counts them."""

    grid: Grid
    q: Tensor | None  # [chunks, G, C, D], as k and v
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, Tensor, Tensor]  # θ [chunks, G, C]; η and α, with chunk steps [chunks, G]
    steps: TokenSteps | ChunkStep

    @classmethod
    def of(cls, call: MemoryCall) -> _Chunks:
        dtype = call.weights[0].dtype
        grid = Grid.of(call.k, call.cu_seqlens, call.position, call.chunk_size)
        k, v, theta = (grid.pack(x.to(dtype)) for x in (call.k, call.v, call.lr))
        q = None if call.q is None else grid.pack(call.q.to(dtype))
        by_token = call.step == "token"
        pack = grid.pack if by_token else grid.pack_chunk_gate
        absent = torch.zeros_like(theta if by_token else theta[..., 0])
        eta, alpha = (absent if g is None else pack(g.to(dtype)) for g in call.tokens[4:])
        gates = (theta, eta, alpha)
        steps: TokenSteps | ChunkStep
        if by_token:
            steps = TokenSteps.of(*gates, grid.mask, every=q is not None)
        else:
            steps = ChunkStep.of(*gates, grid.mask)
        return cls(grid, q, k, v, gates, steps)

    def coefficients(self) -> Iterator[TokenSteps | ChunkStep]:
        """The coefficients of one chunk after the other."""
        return map(type(self.steps)._make, zip(*self.steps, strict=True))

    def gradients(self, parts: Sequence[TokenSteps | ChunkStep]) -> TokenSteps | ChunkStep:
        """Stacks the gradients of each chunk to those of all."""
        if not parts:
            return self.steps.zeros()
        return type(self.steps)(*(torch.stack(x) for x in zip(*parts, strict=True)))


class _Walked(NamedTuple):
    """One chunk of a walk."""

    start: Start
    factors: Factors
    steps: TokenSteps | ChunkStep
    after: tuple[list[Tensor], list[Tensor]]  # weights and momentum


def _start(call: MemoryCall) -> Start:
    """The state that the call is given."""
    weights = fold(call.weights)
    return Start(weights, fold(call.trace), fold(call.anchor) or weights, fold(call.init))


def _walk(call: MemoryCall, chunks: _Chunks, given: Start) -> Iterator[_Walked]:
    """Every chunk in turn, from the state that the one before it leaves."""
    weights, trace, anchor, init = given
    walk = zip(chunks.grid.opens, chunks.k, chunks.v, chunks.coefficients(), strict=True)
    for opens, k, v, steps in walk:
        anchor = weights if opens is None else _where(opens, weights, anchor)
        start = Start(weights, trace, anchor, init)
        f = factors(anchor, k, v, call)
        weights, trace = write(start, f, steps)
        yield _Walked(start, f, steps, (weights, trace))


def memory_fwd(
    call: MemoryCall,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Output, surprise, next weights, momentum, anchor and position.

    The output is empty without queries, anchor and position unless the call keeps its position.
    """
    with portable(call.k.device):
        chunks, k = _Chunks.of(call), call.k
        grid, outputs, surprises = chunks.grid, [], []
        weights, trace, anchor, _ = given = _start(call)
        for i, (start, f, steps, after) in enumerate(_walk(call, chunks, given)):
            (weights, trace), anchor = after, start.anchor
            surprises.append(f.surprise)
            if chunks.q is not None:
                outputs.append(read(chunks.q[i], start, f, steps, call))
        output = k.new_empty(0) if call.q is None else grid.unpack(outputs, call.q)
        surprise = grid.unpack(surprises, call.lr.to(weights[0].dtype))
        keeps = call.keeps_position
        position = grid.position if keeps else k.new_empty(0, dtype=torch.int64)
        # the anchor may be the given weights, and so may the weights if nothing was written
        copy = fresh if k.shape[1] == 0 else Tensor.contiguous
        final = [[copy(grid.per_row(w)) for w in layers] for layers in (weights, trace)]
        kept = [fresh(grid.per_row(w)) for w in anchor if keeps]
        return output.contiguous(), surprise.contiguous(), final[0], final[1], kept, position


def memory_bwd(
    d_output: Tensor,
    d_surprise: Tensor,
    d_weights: Sequence[Tensor],
    d_trace: Sequence[Tensor],
    d_anchor: Sequence[Tensor],
    call: MemoryCall,
) -> list[Tensor]:
    """Gradients of the tensors that are given, in order, from those of :func:`memory_fwd`."""
    with portable(call.k.device):
        dtype, chunks = call.weights[0].dtype, _Chunks.of(call)
        grid, walked = chunks.grid, [*_walk(call, chunks, _start(call))]
        d_surprises = grid.pack(d_surprise.to(dtype))
        d_outputs = None if call.q is None else grid.pack(d_output.to(dtype))
        d_weights, d_trace = fold(d_weights), fold(d_trace)
        zeros = [torch.zeros_like(w) for w in d_weights]
        d_anchor = fold(d_anchor) or zeros
        d_init = zeros if call.init else []
        d_q, d_k, d_v, d_steps = [], [], [], []
        for i in reversed(range(len(walked))):
            start, f, steps, _ = walked.pop()
            grads = write_backward(d_weights, d_trace, start, f, steps)
            if chunks.q is not None and d_outputs is not None:
                d_q.append(read_backward(d_outputs[i], chunks.q[i], start, f, steps, call, grads))
            d_key, d_value, d_a = factors_backward(f, start.anchor, grads, d_surprises[i], call)
            d_k.append(d_key)
            d_v.append(d_value)
            d_steps.append(grads.steps)
            d_weights, d_trace = grads.weights, grads.trace
            d_init = _add(d_init, grads.init)
            # where a row opened the chunk, its anchor was the weights at the start
            if (opens := grid.opens[i]) is None:
                d_weights = _add(d_weights, _add(d_anchor, d_a))
                d_anchor = zeros
                continue
            d_anchor = _add(d_anchor, d_a)
            d_weights = _add(d_weights, _where(opens, d_anchor, zeros))
            d_anchor = _where(opens, zeros, d_anchor)
        if not call.anchor:
            d_weights, d_anchor = _add(d_weights, d_anchor), []
        d_lr, *d_rest = chunks.gradients(d_steps[::-1]).backward(*chunks.gates, grid.mask)
        unpack_gate = grid.unpack if call.step == "token" else grid.unpack_chunk_gate
        grads_of = (d_q[::-1], d_k[::-1], d_v[::-1], d_lr)
        pairs = zip(call.tokens, (*grads_of, *d_rest), strict=True)
        unpack: list[Any] = [grid.unpack] * 4 + [unpack_gate] * 2
        d_tokens = [f(d, x) for f, (x, d) in zip(unpack, pairs, strict=True) if x is not None]
        d_state = (*d_weights, *d_trace, *d_anchor, *d_init)
        return [fresh(d) for d in (*d_tokens, *map(grid.per_row, d_state))]


def _add(a: Layers, b: Layers) -> list[Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _where(rows: Tensor, a: Layers, b: Layers) -> list[Tensor]:
    """Row-wise choice between two lists of weights; ``rows`` ``[G]`` bool."""
    pairs = zip(a, b, strict=True)
    return [torch.where(rows.view(-1, *(1,) * (x.ndim - 1)), x, y) for x, y in pairs]
