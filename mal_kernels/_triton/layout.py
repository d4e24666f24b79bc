"""How a call of the memory is laid out for its kernels: tiles, grids, packed states, buffers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..call import MemoryCall, n_chunks
from .chunks import Rows, States, Static, Tokens
from .tiles import dense, power_of_2
from .write import Factors
from .write_backward import (
    Carried,
    Gradients,
)

WALKED = 128  # tokens of the longest chunk that one program walks


def tile_rule(
    length: int, chunk: int, dim: int, depth: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Tokens of a tile, hidden units of a slice and warps of a program: one choice per size.

    Chosen so that none spills on Hopper (``SWEEP`` of :mod:`.neural_memory`); which is fastest,
    only a GPU can tell.
    Short turns are spread over more programs. A slice wider than a short tile keeps Triton from
    giving every warp the whole tile; in a long tile a narrow one leaves more registers.
    """
    half = dtype.itemsize == 2
    tile = min(64 if half and dim <= 64 and length > 256 else 16, power_of_2(chunk))
    if tile == 16 or (tile == 32 and depth == 1 and dim <= 32):
        return tile, 32 if half or dim <= 64 else 16, 4 if dim <= 32 else 8
    return tile, 32 if tile == 64 and dim > 32 else 16, 8


class Layout(NamedTuple):
    """A layout is what a call looks like: sizes, bounds and what is compiled in."""

    plain: Static  # for the host
    static: Static  # for kernels
    rows: Rows
    sizes: tuple[int, int, int, int]  # T, C, N, chunk gates of a row
    grid: int  # rows times heads
    slots: int
    chunks: int  # at most, of a row
    tiles: int  # at most, of a row
    warps: int
    longest: int  # tokens of a chunk that one program walks

    @property
    def per_chunk(self) -> int:
        """Tiles of a chunk."""
        return triton.cdiv(self.sizes[1], self.plain.BT)

    @property
    def slices(self) -> int:
        """Slices of the hidden width."""
        return triton.cdiv(self.plain.E, self.plain.BE)

    @property
    def is_walked(self) -> bool:
        """Whether one program takes all chunks of a row and head."""
        return self.chunks > 1 and self.sizes[1] <= self.longest

    @classmethod
    def of(cls, call: MemoryCall, *, saves: bool, keeps: bool) -> Layout:
        batch, length, heads, dim = call.k.shape
        rows, depth, size = call.rows, len(call.weights) - call.residual_norm, call.size
        width = call.weights[0].shape[3] if depth == 2 else dim
        position, cu_seqlens = call.position, call.cu_seqlens
        tile, slice_width, warps = tile_rule(length, size, dim, depth, call.k.dtype)
        per_chunk = triton.cdiv(size, tile)
        columns = length + (0 if position is None else size - 1)
        plain = Static(
            H=heads,
            D=dim,
            E=width,
            P=sum(w.shape[2:].numel() for w in call.weights),
            DEPTH=depth,
            ACT=call.activation,
            RESIDUAL_NORM=call.residual_norm,
            CLIPS=call.max_grad_norm is not None,
            MAX_NORM=call.max_grad_norm or 0.0,
            TOKEN_STEPS=call.step == "token",
            HAS_MOMENTUM=call.momentum is not None,
            HAS_DECAY=call.decay is not None,
            HAS_INIT=bool(call.init),
            HAS_POSITION=position is not None,
            IS_VARLEN=cu_seqlens is not None,
            KEEPS_ANCHOR=keeps,
            SAVES_STATES=saves,
            READS=call.q is not None,
            ONE_CHUNK=columns <= size,
            BT=tile,
            BD=power_of_2(dim),
            BE=slice_width,
            LAST=(depth - 1) * dim * width,
            GAIN=depth * dim * width,
        )
        slack = 2 if position is None else 2 + per_chunk
        by_chunk = call.step == "chunk" and call.chunk_size is not None
        return cls(
            plain=plain,
            static=plain.constants(),
            rows=Rows(dense(cu_seqlens), dense(position), call.first_gates() if by_chunk else None),
            sizes=(length, size, rows, 1 if cu_seqlens is not None else n_chunks(length, size)),
            grid=rows * heads,
            slots=batch * length * per_chunk // size + rows * slack,
            chunks=max(triton.cdiv(columns, size), 1),
            tiles=columns // size * per_chunk + triton.cdiv(columns % size, tile),
            warps=warps,
            # walking, a program holds more: at this size it would spill
            longest=0 if dim > 128 and call.k.element_size() == 4 else WALKED,
        )  # fmt: skip


def contiguous(call: MemoryCall) -> Tokens:
    return Tokens(*(dense(x) for x in call.tokens))


def pack_states(layout: Layout, call: MemoryCall) -> States:
    """The numbered states of :mod:`.chunks`, the initial ones and the given anchors filled in."""
    weights, anchor, init = call.weights, call.anchor, call.init
    n, heads = weights[0].shape[:2]
    count = 4 * n + (layout.slots if layout.plain.SAVES_STATES else 0)
    size = layout.plain.P
    packed_weights, packed_trace = (weights[0].new_empty(count, heads, size) for _ in range(2))
    pack(weights, packed_weights[:n])
    pack(call.trace, packed_trace[:n])
    if anchor:
        pack(anchor, packed_weights[2 * n : 3 * n])
    target = pack(init, weights[0].new_empty(n, heads, size)) if init else None
    return States(packed_weights, packed_trace, target)


def pack(tensors: list[Tensor], out: Tensor) -> Tensor:
    """Layers ``[N, H, ...]`` one behind the other in ``[N, H, P]``."""
    return torch.cat([x.flatten(2) for x in tensors], -1, out=out)


def unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The inverse of :func:`pack`, as new tensors."""
    tensors = [w.new_empty(w.shape) for w in like]
    parts = packed.split([w.shape[2:].numel() for w in like], -1)
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.flatten(2).copy_(part)
    return tensors


def new_factors(layout: Layout, tokens: Tokens) -> Factors:
    plain, k = layout.plain, tokens.k
    shape = k.shape[:3]

    def scalars(given: bool = True) -> Tensor | None:
        return k.new_empty(shape, dtype=torch.float32) if given else None

    def vectors(width: int, given: bool = True) -> Tensor | None:
        return k.new_empty(*shape, width) if given else None

    deep = plain.DEPTH == 2
    return Factors(
        h=vectors(plain.E, deep),
        d1=vectors(plain.E, deep),
        d2=vectors(plain.D),
        dg=vectors(plain.D, plain.RESIDUAL_NORM),
        rate=scalars(),
        square=scalars(plain.CLIPS),
        on_w=scalars(),
        on_s=scalars(plain.TOKEN_STEPS),
        tile=k.new_empty(layout.slots, plain.H, 4, dtype=torch.float32),
        surprise=scalars(),
    )


def new_gradients(layout: Layout, tokens: Tokens, d_output: Tensor) -> Gradients:
    plain, k = layout.plain, tokens.k
    deep, norm = plain.DEPTH == 2, plain.RESIDUAL_NORM
    by_token, reads = plain.TOKEN_STEPS, plain.READS
    dim, width = plain.D, plain.E

    def buffer(*size: int, given: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return k.new_empty(*k.shape[:3], *size, dtype=dtype) if given else None

    both = reads and by_token
    return Gradients(
        k=buffer(dim),
        h=buffer(width, given=deep),
        d1=buffer(width, given=deep),
        d2=buffer(dim),
        dg=buffer(dim, given=norm),
        rate=buffer(),
        hq=buffer(width, given=deep and reads, dtype=k.dtype),
        zq=buffer(width, given=deep and reads, dtype=k.dtype),
        oq=buffer(dim, dtype=k.dtype) if reads and norm else d_output,
        gq=buffer(dim, given=reads and norm),
        beta=buffer(given=both),
        f=buffer(given=both),
        decays=buffer(plain.BT, given=both),
        w=buffer(plain.BT, given=both),
        dbeta=buffer(given=both),
        df=buffer(given=both),
        on_w=buffer(given=by_token),
        on_s=buffer(given=by_token),
        tile=k.new_zeros(layout.slots, plain.H, layout.slices, 3, 3, dtype=torch.float32),
    )


def new_carried(
    layout: Layout,
    d_weights: list[Tensor],
    d_trace: list[Tensor],
    d_anchor: list[Tensor],
    init: list[Tensor],
    anchor: list[Tensor],
) -> Carried:
    """The gradients of the final state, which become those of the initial one."""
    n, heads, size = layout.sizes[2], layout.plain.H, layout.plain.P
    like, tiles = d_weights[0], n * layout.per_chunk
    if layout.plain.ONE_CHUNK:
        tiles = layout.slots

    def packed(tensors: list[Tensor]) -> Tensor:
        return pack(tensors, like.new_empty(n, heads, size))

    return Carried(
        weights=packed(d_weights),
        trace=packed(d_trace),
        init=like.new_zeros(n, heads, size) if init else None,
        anchor=like.new_zeros(n, heads, size) if anchor else None,
        returned=packed(d_anchor) if d_anchor else None,
        tile_weights=like.new_empty(tiles, heads, size),
        tile_trace=like.new_empty(tiles, heads, size),
    )
