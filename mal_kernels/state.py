"""Values: the state of a neural memory, and what the ops take and return beside tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MemoryState(NamedTuple):
    """Fast weights ``W`` and momentum ``S`` of one memory per row and head.

    Args:
        weights: one tensor per layer, ``[B, H, d_in, d_out]``; with ``residual_norm`` the gain
            ``γ`` ``[B, H, D]`` comes last. float32 (float64 for float64 inputs).
        momentum: ``S``, same shapes and dtype as ``weights``; kernels call it ``trace``, because
            there ``momentum`` is the gate η.
        anchor: the weights ``W̄`` at which the gradients of the unfinished chunk are taken, same
            shapes as ``weights``; ``None`` at a chunk boundary.
        position: ``[B]`` int64, tokens already seen of the unfinished chunk; ``None`` at a chunk
            boundary. Given together with ``anchor``.

    The state is a value: every op returns a new one and none changes its input. ``torch.save``
    keeps it, and ``torch.load``, which trusts no file, reads it where ``mal_kernels`` is imported.

    Example:
        >>> import torch
        >>> from mal_kernels import MemoryState
        >>> w = (torch.randn(2, 4, 16, 32), torch.randn(2, 4, 32, 16))
        >>> state = MemoryState(w, tuple(torch.zeros_like(x) for x in w))
        >>> state.batch_size, state.nbytes
        (2, 65536)
        >>> state
        MemoryState(2 rows, 4 heads, layers 16×32 32×16, float32 on cpu, 65,536 bytes)
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...] | None = None
    position: Tensor | None = None

    @classmethod
    def from_weights(cls, weights: Sequence[Tensor]) -> MemoryState:
        """A fresh state that starts at ``weights`` with zero momentum."""
        return cls(tuple(weights), tuple(torch.zeros_like(w) for w in weights))

    @classmethod
    def cat(cls, states: Sequence[MemoryState]) -> MemoryState:
        """Stacks the rows of several states. An unfinished chunk in any of them is kept.

        A row at a chunk boundary gets position 0, where the anchor is not read.
        """
        if all(s.position is None for s in states):
            return cls(_cat([s.weights for s in states]), _cat([s.momentum for s in states]))
        full = [s._with_position() for s in states]
        weights, momentum, anchor, position = zip(*full, strict=True)
        return cls(_cat(weights), _cat(momentum), _cat(anchor), torch.cat(position))

    def __repr__(self) -> str:
        first = self.weights[0]
        layers = " ".join("×".join(map(str, w.shape[2:])) for w in self.weights)
        dtype = str(first.dtype).removeprefix("torch.")
        inside = "" if self.anchor is None else ", inside a chunk"
        return (
            f"MemoryState({first.shape[0]} rows, {first.shape[1]} heads, layers {layers}, "
            f"{dtype} on {first.device}, {self.nbytes:,} bytes{inside})"
        )

    @property
    def batch_size(self) -> int:
        """Number of rows ``B``."""
        return self.weights[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by every tensor of the state."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state: weights, momentum, then anchor and position where present."""
        position = () if self.position is None else (self.position,)
        return [*self.weights, *self.momentum, *(self.anchor or ()), *position]

    def end_chunk(self) -> MemoryState:
        """Closes the current chunk early: the next token's gradient is taken at today's weights."""
        return MemoryState(self.weights, self.momentum)

    def detach(self) -> MemoryState:
        """Returns the values cut from the autograd graph (truncated backpropagation)."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> MemoryState:
        """Returns the state on ``device``."""
        return self.map(lambda t: t.to(device))

    def index_select(self, rows: Tensor) -> MemoryState:
        """The rows ``rows`` ``[R]`` (int64, repeats allowed) as a state of ``R`` rows."""
        return self.map(lambda t: t.index_select(0, rows))

    def is_finite(self) -> Tensor:
        """``[B]`` bool: whether every weight and momentum of a row is finite."""
        finite = [t.isfinite().flatten(1).all(1) for t in (*self.weights, *self.momentum)]
        return torch.stack(finite).all(0)

    def norm(self) -> Tensor:
        """``[B, H]``: Frobenius norm of each head's weights and momentum together.

        In float64, where no finite float32 state overflows. A norm that keeps growing is a memory
        that diverges; ``MALConfig.max_state_norm`` bounds it.
        """
        return self._norm(torch.float64)

    def _norm(self, dtype: torch.dtype | None = None) -> Tensor:
        norms = [
            torch.linalg.vector_norm(t.flatten(2), dim=2, dtype=dtype)
            for t in (*self.weights, *self.momentum)
        ]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def is_below(self, bound: float) -> Tensor:
        """``[B]`` bool, on the CPU: whether the norm of every head is below ``bound``."""
        # float32 tells what is far below, at a fraction of the time; NaN and overflow are not
        if (self._norm() < 0.999 * bound).all():
            return torch.ones(self.batch_size, dtype=torch.bool)
        return (self.norm() < bound).all(1).cpu()

    def map(self, f: Callable[[Tensor], Tensor]) -> MemoryState:
        """The state with ``f`` applied to each of its tensors, ``position`` too."""
        weights, momentum = (tuple(f(t) for t in field) for field in self[:2])
        anchor = None if self.anchor is None else tuple(f(t) for t in self.anchor)
        position = None if self.position is None else f(self.position)
        return MemoryState(weights, momentum, anchor, position)

    def _with_position(self) -> MemoryState:
        if self.position is not None:
            return self
        zero = torch.zeros(self.batch_size, dtype=torch.int64, device=self.weights[0].device)
        return self._replace(anchor=self.weights, position=zero)


class MemoryUpdate(NamedTuple):
    """A write returns ``state`` and ``surprise`` ``‖M(k_t; W̄) − v_t‖²`` ``[B, T, H]``."""

    state: MemoryState
    surprise: Tensor


class NeuralMemoryOutput(NamedTuple):
    """The layer returns ``output`` ``[B, T, H, D]``, ``state`` and ``surprise``."""

    output: Tensor
    state: MemoryState
    surprise: Tensor

    @classmethod
    def of(
        cls,
        output: Tensor,
        surprise: Tensor,
        weights: Sequence[Tensor],
        trace: Sequence[Tensor],
        anchor: Sequence[Tensor],
        position: Tensor,
    ) -> NeuralMemoryOutput:
        """Names what a backend returns; anchor and position are empty where not kept."""
        state = MemoryState(tuple(weights), tuple(trace))
        if anchor:
            state = state._replace(anchor=tuple(anchor), position=position)
        return cls(output, state, surprise)


class MomentumScan(NamedTuple):
    """The scan returns ``weights`` and ``momentum`` after every token ``[B, T, H, ...]``."""

    weights: Tensor
    momentum: Tensor


class ReadParams(NamedTuple):
    """Parameters of the aligned read: ``Dm`` features of the host, ``H`` heads of ``D``.

    ``norm`` ``[Dm]``, ``w_q`` and ``w_gate`` ``[H·D, Dm]``, ``w_out`` ``[Dm, H·D]``.
    """

    norm: Tensor
    w_q: Tensor
    w_gate: Tensor
    w_out: Tensor


def _cat(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(layer) for layer in zip(*rows, strict=True))


# so that torch.load(path, weights_only=True), its default, reads what torch.save wrote
torch.serialization.add_safe_globals([MemoryState])
