"""Launchers of the write and the causal read. Computes :func:`mal_kernels.reference.recurrence`.

* one chunk (``chunk_size=None``), or chunks of more than 128 tokens: two launches a chunk, parallel
  over tiles and over slices of the state (:mod:`.write`);
* shorter chunks: one launch whose programs walk the chunks of a row and head (but for float32 with
  more than 128 features, which would spill);
* then one launch that reads all tiles in parallel (:mod:`.causal_read`).

Backward runs the write again, keeping the state before every tile, then the reads of all tiles
in parallel (:mod:`.causal_read_backward`), then three launches a chunk, from the last to the first
(:mod:`.write_backward`): one program holding all three would spill. Ragged rows get as many as the
longest row could need. ``MAL_CHECKPOINT_SPACING=n`` does so for ``n`` chunks at a time
(:func:`checkpoint_spacing`): less memory, one more write of every chunk.

Nothing here reads a value on the host: the number of tiles of ragged rows is bounded, not known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product

import torch
import triton
from torch import Tensor

from ..call import MemoryCall
from ..errors import ArgumentError
from .causal_read import causal_read_fwd_kernel
from .causal_read_backward import (
    read_keys_bwd_kernel,
    read_output_bwd_kernel,
    read_queries_bwd_kernel,
    read_scores_bwd_kernel,
)
from .chunks import States, Tokens
from .decode import decode_fwd, is_one_token
from .layout import Layout, contiguous, new_carried, new_factors, new_gradients, pack_states, unpack
from .tiles import launch_options, meta
from .write import Factors, factors_fwd_kernel, state_fwd_kernel, write_fwd_kernel
from .write_backward import (
    Carried,
    Gradients,
    Results,
    anchor_bwd_kernel,
    chunk_gates_bwd_kernel,
    factors_bwd_kernel,
    state_bwd_kernel,
    token_gates_bwd_kernel,
)


def memory_fwd(
    call: MemoryCall, *, keeps: bool | None = None
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Output, surprise, next weights, momentum, anchor and position; the last two if ``keeps``."""
    keeps = call.keeps_position if keeps is None else keeps
    if is_one_token(call.k, call.cu_seqlens):
        return decode_fwd(call, keeps=keeps)
    k, tokens = call.k, contiguous(call)
    layout = Layout.of(call, saves=call.q is not None, keeps=keeps)
    states = pack_states(layout, call)
    factors = new_factors(layout, tokens)
    write(layout, tokens, states, factors)
    output = k.new_empty(0) if call.q is None else k.new_empty(k.shape)
    if call.q is not None:
        read(layout, tokens, states, factors, output)
    n = call.rows
    kept = unpack(states.weights[3 * n : 4 * n], call.weights) if keeps else []
    offset = call.next_position() if keeps else k.new_empty(0, dtype=torch.int64)
    final = [unpack(x[n : 2 * n], call.weights) for x in (states.weights, states.trace)]
    return output, factors.surprise, *final, kept, offset


def write(layout: Layout, tokens: Tokens, states: States, factors: Factors) -> None:
    """Fills ``factors``, and ``states`` but for what is packed."""
    length, size, n, gates = layout.sizes
    static, arguments = layout.static, (tokens, states, factors, layout.rows)
    if not layout.grid:
        return
    if layout.is_walked:
        write_fwd_kernel[(layout.grid,)](
            *arguments, length, size, n, gates, static, **launch_options(layout.warps, num_stages=1)
        )  # fmt: skip
        return
    for i_c in range(layout.chunks):
        if layout.tiles:
            factors_fwd_kernel[(layout.grid, min(layout.tiles, layout.per_chunk))](
                *(*arguments, length, size, n, gates, i_c, static),
                **launch_options(layout.warps, num_stages=2),
            )
        state_fwd_kernel[(layout.grid, layout.slices)](
            *arguments, length, size, n, i_c, static, **launch_options(layout.warps, num_stages=1)
        )


def read(layout: Layout, tokens: Tokens, states: States, factors: Factors, output: Tensor) -> None:
    if layout.grid and layout.tiles:
        causal_read_fwd_kernel[(layout.grid, layout.tiles)](
            *(tokens, states, factors, layout.rows, output),
            *layout.sizes[:3],
            layout.static,
            **launch_options(layout.warps, num_stages=2),
        )


def checkpoint_spacing() -> int | None:
    """``MAL_CHECKPOINT_SPACING``: after how many chunks a backward pass keeps a state; None: all.

    A pass keeps the state before every tile of at most so many chunks at a time, and else one
    state for each such segment, for which every chunk is written once more.

    Raises:
        ArgumentError: it is not a positive integer.
    """
    value = os.environ.get("MAL_CHECKPOINT_SPACING", "")
    if value and not (value.isdecimal() and int(value)):
        raise ArgumentError(
            f"MAL_CHECKPOINT_SPACING: got {value!r}, expected a number of chunks, at least 1; "
            "unset it to keep the state before every tile"
        )
    return int(value) if value else None


def memory_bwd(
    d_output: Tensor,
    d_surprise: Tensor,
    d_weights: list[Tensor],
    d_trace: list[Tensor],
    d_anchor: list[Tensor],
    call: MemoryCall,
) -> list[Tensor]:
    """Gradients of the tensors that are given, in order.

    In segments of :func:`checkpoint_spacing` chunks, from the last to the first: a stream may be
    cut anywhere. Ragged chunk steps, whose chunks end in different places, are one segment.
    """
    spacing, length = checkpoint_spacing(), call.k.shape[1]
    whole = call.chunk_size is None or (call.step == "chunk" and call.cu_seqlens is not None)
    stride = length if spacing is None or whole else spacing * call.chunk_size
    marks = [*range(0, length, stride or 1), length]
    if len(marks) <= 2:
        return segment_bwd(d_output, d_surprise, d_weights, d_trace, d_anchor, call)
    segments = checkpointed([segment(call, *ends) for ends in pairwise(marks)])
    d_tokens: list[list[Tensor]] = []
    d_state, d_init = [d_weights, d_trace, d_anchor], [torch.zeros_like(x) for x in call.init]
    for begin, end in reversed([*pairwise(marks)]):
        part = segments.pop()
        d_outputs = [x[:, begin:end] if x.numel() else x for x in (d_output, d_surprise)]
        grads = iter(segment_bwd(*d_outputs, *d_state, part))
        d_tokens.append([next(grads) for x in call.tokens if x is not None])
        d_state = [[next(grads) for _ in x] for x in (part.weights, part.trace, part.anchor)]
        d_init = [x + next(grads) for x in d_init]
    joined = [torch.cat(parts, 1) for parts in zip(*reversed(d_tokens), strict=True)]
    return [*joined, *(x for tensors in (*d_state, d_init) for x in tensors)]


def segment(call: MemoryCall, begin: int, end: int) -> MemoryCall:
    """Cuts ``begin : end`` along T out of the arguments; momentum and decay have coarser T."""
    gate_tokens = call.chunk_size if call.step == "chunk" else 1
    gates = slice(begin // gate_tokens, triton.cdiv(end, gate_tokens))
    spans = (*(slice(begin, end),) * 4, gates, gates)
    cut = (x if x is None else x[:, at] for x, at in zip(call.tokens, spans, strict=True))
    bounds = call.cu_seqlens
    return call._replace(
        **Tokens(*cut)._asdict(),
        cu_seqlens=None if bounds is None else bounds.clamp(begin, end) - begin,
    )


def checkpointed(segments: list[MemoryCall]) -> list[MemoryCall]:
    """Each segment from the state that the one before it leaves."""
    # a row that does not begin with a chunk, or not with a segment, is cut inside a chunk
    keeps = segments[0].position is not None or segments[0].cu_seqlens is not None
    for i in range(len(segments) - 1):  # by index: each is written into the list before it is read
        call = segments[i]._replace(q=None)
        _, _, weights, trace, anchor, position = memory_fwd(call, keeps=keeps)
        state = dict(weights=weights, trace=trace, anchor=anchor)
        segments[i + 1] = segments[i + 1]._replace(**state, position=position if keeps else None)
    return segments


def segment_bwd(
    d_output: Tensor,
    d_surprise: Tensor,
    d_weights: list[Tensor],
    d_trace: list[Tensor],
    d_anchor: list[Tensor],
    call: MemoryCall,
) -> list[Tensor]:
    """:func:`memory_bwd`, keeping the state before every tile."""
    tokens, weights = contiguous(call), call.weights
    layout = Layout.of(call, saves=True, keeps=bool(d_anchor))
    states = pack_states(layout, call)
    factors = new_factors(layout, tokens)
    write(layout, tokens, states, factors)
    d_output = d_output.contiguous()
    gradients = new_gradients(layout, tokens, d_output)
    carried = new_carried(layout, d_weights, d_trace, d_anchor, call.init, call.anchor)
    d_q, *results = (None if x is None else x.new_empty(x.shape) for x in tokens)
    results = Results(*results, d_surprise.contiguous())
    if layout.grid:
        backward(layout, tokens, states, factors, gradients, carried, results, d_output, d_q)
    d_tokens = [x for x in (d_q, *results[:5]) if x is not None]
    d_states = [unpack(carried.weights, weights), unpack(carried.trace, weights)]
    if call.anchor:
        d_states.append(unpack(carried.anchor, weights))
    if call.init:
        d_states.append(unpack(carried.init, weights))
    return [*d_tokens, *(x for state in d_states for x in state)]


def backward(
    layout: Layout,
    tokens: Tokens,
    states: States,
    factors: Factors,
    gradients: Gradients,
    carried: Carried,
    results: Results,
    d_output: Tensor,
    d_q: Tensor | None,
) -> None:
    """The reads of all tiles, then the chunks from the last to the first, then the gates."""
    static, rows, (length, size, n, gates) = layout.static, layout.rows, layout.sizes
    saved, sizes, grid = (tokens, states, factors), (length, size, n), layout.grid
    options = launch_options(layout.warps, num_stages=1)
    # holds more per token than the others, so in long tiles sees less of the hidden width at a time
    narrow = replace(layout.plain, BE=16 if layout.plain.BT == 64 else layout.plain.BE).constants()
    if d_q is not None and layout.tiles:
        tiles, shared = (grid, layout.tiles), (*saved, gradients, rows)
        reads = (*shared, d_output)
        if layout.plain.TOKEN_STEPS and layout.plain.RESIDUAL_NORM:
            read_output_bwd_kernel[tiles](*reads, *sizes, static, **options)
        if layout.plain.TOKEN_STEPS:
            read_scores_bwd_kernel[tiles](*shared, *sizes, static, **options)
        read_queries_bwd_kernel[tiles](*reads, d_q, *sizes, static, **options)
        if layout.plain.TOKEN_STEPS:
            read_keys_bwd_kernel[tiles](*reads, d_q, *sizes, static, **options)
    slices, tiles = (grid, layout.slices), (grid, min(layout.tiles, layout.per_chunk))
    for i_c in reversed(range(layout.chunks)):
        at = (*sizes, i_c)
        state_bwd_kernel[slices](*saved, gradients, carried, rows, *at, static, **options)
        if layout.tiles:
            factors_bwd_kernel[tiles](
                *saved, gradients, carried, results, rows, *at, narrow, **options
            )
        anchor_bwd_kernel[slices](
            *(tokens, factors, gradients, carried, rows), *at, static, **options
        )
    if results.momentum is None and results.decay is None:
        return
    d_tile = gradients.tile.sum((2, 3))
    if not layout.plain.TOKEN_STEPS:
        chunk_gates_bwd_kernel[(grid, layout.chunks)](
            results, rows, d_tile, length, size, gates, static, **launch_options(1)
        )
    elif layout.tiles:
        token_gates_bwd_kernel[(grid, layout.tiles)](
            tokens, gradients, results, rows, d_tile, length, size, static, **options
        )


def _example(
    tokens: int,
    dim: int,
    width: int,
    chunk_size: int | None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    depth: int = 2,
    step: str = "token",
    residual_norm: bool = False,
    everything: bool = False,
    ragged: bool = False,
) -> Callable[[], object]:
    """``everything``: ragged rows inside a chunk, a bound on the gradient and decay's target."""

    def launch() -> object:
        rows, batch, heads = 2, 1 if ragged or everything else 2, 4
        q = meta(batch, tokens, heads, dim, dtype=dtype)
        lr = meta(batch, tokens, heads)
        gate = lr if step == "token" else meta(batch, rows if ragged else 1, heads)
        weights = [meta(rows, heads, dim, width), meta(rows, heads, width, dim)][-depth:]
        weights += [meta(rows, heads, dim)] if residual_norm else []
        cu_seqlens = meta(rows + 1, dtype=torch.int64) if ragged or everything else None
        anchor, position = (weights, meta(rows, dtype=torch.int64)) if everything else ([], None)
        init = weights if step == "chunk" or everything else []
        max_norm = 1.0 if step == "chunk" or everything else None
        inputs = (q, q, q, lr, gate, gate, weights, weights, anchor, init, position, cu_seqlens)
        call = MemoryCall(*inputs, chunk_size, step, "gelu", residual_norm, max_norm)
        forward = memory_fwd(call, keeps=everything)
        return forward, memory_bwd(q, lr, weights, weights, anchor, call)

    return launch


def _all_options(
    dim: int,
    dtype: torch.dtype,
    depth: int = 2,
    residual_norm: bool = True,
    *,
    tokens: int = 320,
    chunk_size: int | None = 64,
) -> Callable[[], object]:
    return _example(
        *(tokens, dim, dim if depth == 1 else 4 * dim, chunk_size, dtype),
        depth=depth,
        residual_norm=residual_norm,
        everything=True,
    )


EXAMPLES = {
    "D64 E256 chunk 64 bf16": _example(320, 64, 256, 64),
    "D64 E128 turn ragged bf16": _example(112, 64, 128, None, step="chunk", ragged=True),
    "D64 E256 norm, all options, bf16": _all_options(64, torch.bfloat16),
    "D64 E256 norm, all options, chunk 32 bf16": _all_options(64, torch.bfloat16, chunk_size=32),
    "D128 E512, all options, bf16": _all_options(128, torch.bfloat16, residual_norm=False),
    "D128 E512 norm, all options, fp32": _all_options(128, torch.float32),
    "D16 E64, all options, fp32": _all_options(16, torch.float32, residual_norm=False),
    "D256 depth 1, all options, fp32": _all_options(256, torch.float32, 1, False),
}


def _sweep() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every size by kind that may be chosen: features, dtype, tile, walked or a whole turn."""
    for depth, dims in ((2, (16, 32, 64, 128)), (1, (16, 32, 64, 128, 256))):
        for dim, norm in product(dims, (False, True)):
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
                kind = f"D{dim} depth {depth}{', norm' * norm}, {name}"
                options = (dim, dtype, depth, norm)
                yield kind, _all_options(*options)
                if name == "bf16" and dim <= 64:
                    yield f"{kind}, tile 32", _all_options(*options, chunk_size=32)
                    yield f"{kind}, tile 16", _all_options(*options, tokens=256)
                if norm:
                    width = dim if depth == 1 else 4 * dim
                    turn = dict(depth=depth, step="chunk", ragged=True, residual_norm=True)
                    yield f"{kind}, turn", _example(112, dim, width, None, dtype, **turn)
    yield "D48 depth 1, norm, bf16", _all_options(48, torch.bfloat16, 1)
    for dim in (64, 128):
        whole = _all_options(dim, torch.bfloat16, tokens=1024, chunk_size=None)
        yield f"D{dim} depth 2, norm, bf16, whole call", whole


# for `python -m mal_kernels._triton.aot`
SWEEP = EXAMPLES | dict(_sweep())
