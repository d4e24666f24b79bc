"""Rows of unequal length on one grid of chunks: how the portable backend lays out tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..call import bounds_of, chunk_counts


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
        cu_seqlens: Tensor | None,
        position: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Grid:
        """The grid of tokens ``x`` ``[B, T, H, ...]``, ragged if ``cu_seqlens`` is given."""
        bounds = bounds_of(x, cu_seqlens)
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
        x = rearrange(x, "b t ... -> (b t) ...")
        if self.slot is not None:
            empty = x.new_zeros(self.rows * self.chunks * self.size, *x.shape[1:])
            x = empty.index_copy(0, self.slot, x)
        sizes = dict(n=self.rows, c=self.chunks, s=self.size)
        return rearrange(x, "(n c s) h ... -> c (n h) s ...", **sizes).contiguous()

    def pack_chunk_gate(self, gate: Tensor) -> Tensor:
        """``[B, NC, H]`` to ``[chunks, G]``."""
        return rearrange(rearrange(gate, "b c h -> (b c) h")[self.gate_index], "c n h -> c (n h)")

    def unpack(self, chunks: Sequence[Tensor], like: Tensor) -> Tensor:
        """The inverse of :meth:`pack`, with the shape and dtype of ``like``; a new tensor."""
        if not len(chunks):
            return torch.zeros_like(like)
        heads = dict(n=self.rows, h=self.heads)
        rows = [rearrange(chunk, "(n h) s ... -> n s h ...", **heads) for chunk in chunks]
        x = torch.cat(rows, 1)
        if self.slot is not None:
            x = rearrange(x, "n t ... -> (n t) ...")[self.slot]
        return x.reshape(like.shape).to(like.dtype)

    def unpack_chunk_gate(self, chunks: Sequence[Tensor], like: Tensor) -> Tensor:
        """The transpose of :meth:`pack_chunk_gate`; of a gate's chunks one alone is not idle."""
        total = torch.zeros_like(rearrange(like, "b c h -> (b c) h"))
        for index, chunk in zip(self.gate_index, chunks, strict=True):
            row = rearrange(chunk, "(n h) -> n h", h=self.heads).to(total.dtype)
            total = total.index_add(0, index, row)
        return total.view(like.shape)

    def per_row(self, x: Tensor) -> Tensor:
        """``[G, ...]`` to ``[N, H, ...]``."""
        return x.view(self.rows, self.heads, *x.shape[1:])
