"""The report on a turn: what was heard, read and written, in numbers and not in embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

NAN = float("nan")
GATES = ("lr", "momentum", "decay")


class Gates(Protocol):
    """The part of a :class:`NeuralMemory` that a report asks."""

    heads: int

    def rates(self, tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`NeuralMemory.rates`."""


class TurnReport:
    """A report says what a turn did: ``mal.last_turn``, in figures computed when it ends.

    Attributes:
        rows: dialogues in the batch.
        resent: clips of each dialogue that were written in an earlier turn, and so are not again.
        skipped_by_row: writes left out per dialogue, because what was heard, or the result, was not
            finite, or because a head would have grown beyond ``MALConfig.max_state_norm``.

    Example:
        >>> from mal_kernels import MALAdapter, MALConfig
        >>> from mal_kernels.testing import tiny_host, tiny_inputs
        >>> host = tiny_host("qwen2_audio")
        >>> mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(host)
        >>> with mal.dialogue("call-17"):
        ...     _ = host.generate(**tiny_inputs(host, [[5, 4]]))
        >>> mal.last_turn
        TurnReport(tokens=[9], resent=[0], skipped=0)
    """

    def __init__(self, rows: int, memory: Gates) -> None:
        self.rows, self.skipped_by_row, self._memory = rows, [0] * rows, memory
        self.resent = [0] * rows
        self._tokens = [0] * rows
        # until the turn ends: row, and [T, Dm] before and after the read, of each new clip; row,
        # and [T, H], of each write
        self._heard: list[tuple[int, Tensor, Tensor]] = []
        self._written: list[tuple[int, Tensor]] = []
        # [rows] or [rows, H], on the device of the host
        self._means = {"surprise": torch.full((rows,), NAN), "ratio": torch.full((rows,), NAN)}
        self._means |= {name: torch.full((rows, memory.heads), NAN) for name in GATES}

    def __repr__(self) -> str:
        return f"TurnReport(tokens={self.tokens}, resent={self.resent}, skipped={self.skipped})"

    def heard(self, row: int, before: Tensor, after: Tensor) -> None:
        """Adds the tokens of a new clip, before and after the read."""
        self._tokens[row] += len(before)
        self._heard.append((row, before.detach(), after.detach()))

    def wrote(self, row: int, surprise: Tensor) -> None:
        """Adds a write to the memory that ``row`` reads."""
        self._written.append((row, surprise.detach()))

    @torch.no_grad()
    def finish(self) -> None:
        """Computes the figures, and lets go of what was heard.

        They stay where they are until somebody asks: to fetch them here would wait for the GPU.
        """
        if self._written:
            rows, writes = zip(*self._written, strict=True)
            surprise = torch.cat(writes).mean(1)
            row_of = _each(rows, list(map(len, writes)), surprise)
            self._means["surprise"] = self._mean(surprise, row_of)
        if self._heard:
            rows, before, after = zip(*self._heard, strict=True)
            lengths = list(map(len, before))
            self._gates(rows, lengths, torch.cat(before))
            x, y = torch.cat(before).float(), torch.cat(after).float()
            row_of = _each(rows, lengths, x)
            added, there = (self._mean(z.square().sum(1), row_of) for z in (y - x, x))
            self._means["ratio"] = (added / there).sqrt()
        self._heard, self._written = [], []
        del self._memory

    def _gates(self, rows: Sequence[int], lengths: list[int], tokens: Tensor) -> None:
        """``tokens`` ``[N, Dm]`` of all clips, of so many tokens each."""
        ends = torch.tensor([0, *lengths]).cumsum(0).to(tokens.device, non_blocking=True)
        lr, *rest = self._memory.rates(tokens, ends)
        clip_of = _each(range(len(rows)), lengths, tokens)
        lr = lr.new_zeros(len(rows), lr.shape[1]).index_add(0, clip_of, lr)
        row_of = _each(rows, [1] * len(rows), tokens)
        for name, rate in zip(GATES, (lr, *rest), strict=True):
            self._means[name] = self._mean(rate, row_of)

    def _mean(self, x: Tensor, row_of: Tensor) -> Tensor:
        """The mean in each row of ``x`` ``[N, ...]``, NaN where there is none."""
        if self.rows == 1:
            return x.mean(0, keepdim=True)
        sums, counts = x.new_zeros(self.rows, *x.shape[1:]), x.new_zeros(self.rows)
        counts = counts.index_add(0, row_of, x.new_ones(len(x)))
        return sums.index_add(0, row_of, x) / counts.view(-1, *[1] * (x.dim() - 1))

    @property
    def skipped(self) -> int:
        """Writes left out, of all dialogues."""
        return sum(self.skipped_by_row)

    @property
    def tokens(self) -> list[int]:
        """New audio tokens of each dialogue."""
        return list(self._tokens)

    @property
    def surprise(self) -> Tensor:
        """``[rows]``: mean of ``‖M(k) − v‖²`` over what was written, NaN where nothing was."""
        return self._means["surprise"].cpu()

    @property
    def rates(self) -> dict[str, Tensor]:
        """Gates of the writes, each ``[rows, H]``, NaN where nothing was heard.

        ``lr`` is the mean write rate of a token before the division by the tokens of its turn,
        ``momentum`` and ``decay`` are those of the turn.
        """
        return {name: self._means[name].cpu() for name in GATES}

    @property
    def residual_ratio(self) -> Tensor:
        """``[rows]``: norm of the residual over that of the tokens it is added to, or NaN."""
        return self._means["ratio"].cpu()


def _each(owners: Sequence[int], lengths: Sequence[int], like: Tensor) -> Tensor:
    """The owner of each of so many tokens, without waiting for the device of ``like``."""
    owner_of = torch.tensor(owners).repeat_interleave(torch.tensor(lengths))
    return owner_of.to(like.device, non_blocking=True)
