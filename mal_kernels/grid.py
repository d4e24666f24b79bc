"""Rows of unequal length on one grid of chunks: how the reference lays out tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .call import chunk_counts


class Grid(NamedTuple):
    """Tokens of all rows laid on ``[N, chunks · size]`` slots, each row shifted by its position.

    Rows and heads stand in one dimension ``G = N · H`` of everything that is packed.
    """

    slot: Tensor | None  # [B·T] int64, of each token; None: token i is in slot i
    rows: int
    heads: int
    chunks: int
    size: int  # slots of a chunk
    mask: Tensor | None  # [chunks, G, size] bool, slot holds a token; None: every slot does
    opens: list[Tensor | None]  # per chunk [G] bool: the row starts a chunk here; None: every row
    position: Tensor  # [N] int64, after the last token
    gate_index: Tensor  # [chunks, N] int64, the row's chunk gate in the flattened [B·NC]

    @classmethod
    def of(
        cls,
        x: Tensor,
        bounds: list[tuple[int, int, int]],
        position: Tensor | None,
        chunk_size: int | None,
    ) -> Grid:
        """The grid of tokens ``x`` ``[B, T, H, ...]`` in the rows ``bounds``."""
        counted = [end - begin for _, begin, end in bounds]
        lengths = torch.tensor(counted, dtype=torch.int64, device=x.device)
        start = torch.zeros_like(lengths) if position is None else position
        size = chunk_size or max([1, *counted])
        first, last = (start.tolist(), (start + lengths).tolist())
        chunks = -(-max(last, default=0) // size)
        # slots of a single chunk begin with its first token and end with its last
        begin = min(first, default=0) if chunks <= 1 else 0
        width = max(1, max(last, default=0) - begin) if chunks <= 1 else size
        slots = torch.arange(begin, begin + chunks * width, device=x.device)
        filled = (slots >= start.unsqueeze(1)) & (slots < (start + lengths).unsqueeze(1))
        is_full = all(n == chunks * width for n in counted)
        slot = None if is_full else filled.flatten().nonzero()[:, 0]
        counts = chunk_counts(lengths, size)
        chunk = torch.arange(chunks, device=x.device).unsqueeze(1)
        gate_index = (counts.cumsum(0) - counts) + torch.minimum(chunk, counts - 1)
        heads, holds = x.shape[2], filled.view(len(bounds), chunks, width).transpose(0, 1)
        opens: list[Tensor | None] = [None] * chunks
        if position is not None or len(set(counted)) > 1:
            starts = [m.any(-1) & ((start == 0) | (c > 0)) for c, m in enumerate(holds)]
            opens = [s.repeat_interleave(heads) for s in starts]
        mask = None if is_full else holds.repeat_interleave(heads, 1)
        end = (start + lengths) % size
        return cls(slot, len(bounds), heads, chunks, width, mask, opens, end, gate_index)

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, H, ...]`` to ``[chunks, G, size, ...]``, zero where there is no token."""
        x = x.flatten(0, 1)
        if self.slot is not None:
            empty = x.new_zeros(self.rows * self.chunks * self.size, *x.shape[1:])
            x = empty.index_copy(0, self.slot, x)
        grid = x.view(self.rows, self.chunks, self.size, *x.shape[1:])
        return grid.transpose(0, 1).transpose(2, 3).contiguous().flatten(1, 2)

    def pack_chunk_gate(self, gate: Tensor) -> Tensor:
        """``[B, NC, H]`` to ``[chunks, G]``."""
        return gate.flatten(0, 1)[self.gate_index].flatten(1)

    def unpack(self, chunks: list[Tensor], like: Tensor) -> Tensor:
        """The inverse of :meth:`pack`, with the shape and dtype of ``like``; a new tensor."""
        if not chunks:
            return torch.zeros_like(like)
        x = torch.cat([self.per_row(chunk).transpose(1, 2) for chunk in chunks], 1)
        if self.slot is not None:
            x = x.flatten(0, 1)[self.slot]
        return x.reshape(like.shape).to(like.dtype)

    def per_row(self, x: Tensor) -> Tensor:
        """``[G, ...]`` to ``[N, H, ...]``."""
        return x.view(self.rows, self.heads, *x.shape[1:])


def bounds_of(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """``(b, begin, end)`` of every sequence."""
    if cu_seqlens is None:
        return [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    marks = cu_seqlens.tolist()
    return [(0, begin, end) for begin, end in pairwise(marks)]
