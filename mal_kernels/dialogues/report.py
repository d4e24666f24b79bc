"""The report on a turn: what was heard, read and written, in numbers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

NAN = float("nan")


class Gates(Protocol):
    """The part of a :class:`NeuralMemory` that a report asks."""

    heads: int

    def rates(self, tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`NeuralMemory.rates`."""


class TurnReport:
    """What the last turn did: ``mal.last_turn``. Figures are computed when they are asked for.

    Attributes:
        rows: dialogues in the batch.
        skipped_by_row: writes left out per dialogue, because what was heard, or the result, was not
            finite, or because a head would have grown beyond ``MALConfig.max_state_norm``.

    Example:
        >>> from mal_kernels import MALAdapter, MALConfig
        >>> from mal_kernels.testing import tiny_host, tiny_inputs
        >>> host = tiny_host("qwen2_audio")
        >>> mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(host)
        >>> with mal.dialogue("call-17"):
        ...     _ = host.generate(**tiny_inputs(host, [[5, 4]]))
        >>> mal.last_turn.tokens, mal.last_turn.skipped
        ([9], 0)
    """

    def __init__(self, rows: int, memory: Gates) -> None:
        self.rows, self.skipped_by_row, self._memory = rows, [0] * rows, memory
        self._before: list[list[Tensor]] = [[] for _ in range(rows)]  # [T, Dm] of each new clip
        self._after: list[list[Tensor]] = [[] for _ in range(rows)]
        self._surprise: list[list[Tensor]] = [[] for _ in range(rows)]  # [T, H] of each write

    def heard(self, row: int, before: Tensor, after: Tensor) -> None:
        """Adds the tokens of a new clip, before and after the read."""
        self._before[row].append(before.detach())
        self._after[row].append(after.detach())

    def wrote(self, row: int, surprise: Tensor) -> None:
        """Adds a write to the memory that ``row`` reads."""
        self._surprise[row].append(surprise.detach())

    @property
    def skipped(self) -> int:
        """Writes left out, of all dialogues."""
        return sum(self.skipped_by_row)

    @property
    def tokens(self) -> list[int]:
        """New audio tokens of each dialogue."""
        return [sum(map(len, clips)) for clips in self._before]

    @property
    def surprise(self) -> Tensor:
        """``[rows]``: mean of ``‖M(k) − v‖²`` over what was written, NaN where nothing was."""
        return torch.tensor([float(torch.cat(x).mean()) if x else NAN for x in self._surprise])

    @property
    def rates(self) -> dict[str, Tensor]:
        """Gates of the writes, each ``[rows, H]``, NaN where nothing was heard.

        ``lr`` is the mean write rate of a token before the division by the tokens of its turn,
        ``momentum`` and ``decay`` are those of the turn.
        """
        names = ("lr", "momentum", "decay")
        rates = {name: torch.full((self.rows, self._memory.heads), NAN) for name in names}
        with torch.no_grad():
            for row, clips in enumerate(self._before):
                ends = torch.tensor([0, *map(len, clips)]).cumsum(0)
                if clips:
                    tokens = torch.cat(clips)
                    lr, *rest = self._memory.rates(tokens, ends.to(tokens.device))
                    for name, rate in zip(names, (lr.sum(0) / len(clips), *rest), strict=True):
                        rates[name][row] = rate.reshape(-1, self._memory.heads).mean(0)
        return rates

    @property
    def residual_ratio(self) -> Tensor:
        """``[rows]``: norm of the residual over that of the tokens it is added to, or NaN."""
        ratios = torch.full((self.rows,), NAN)
        for row in range(self.rows):
            if self._before[row]:
                before, after = (torch.cat(x[row]).float() for x in (self._before, self._after))
                ratios[row] = (after - before).norm() / before.norm()
        return ratios
