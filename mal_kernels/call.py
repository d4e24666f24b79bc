"""The arguments of the ops, each named once: operator schemas are made of them, backends get them.

A call is flat, as an operator wants it: a state is lists of tensors, an absent one an empty list.
Shapes and meanings are those of the public functions in :mod:`mal_kernels.ops`; ``trace`` is the
state's momentum S (the gate η has the word).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias, get_type_hints

import torch
from torch import Tensor

from .state import MemoryState

# of a call; … is where a tensor was
Field: TypeAlias = Tensor | list[Tensor] | EllipsisType | int | float | str | None
# how an annotation is spelled in the schema of an operator
SCHEMA_TYPES: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    int | None: "SymInt?",
    float | None: "float?",
    str: "str",
    bool: "bool",
}


class MemoryCall(NamedTuple):
    """One call of the memory: the tensors with a gradient, those without, then the options."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    decay: Tensor | None
    weights: list[Tensor]
    trace: list[Tensor]
    anchor: list[Tensor]
    init: list[Tensor]
    position: Tensor | None = None
    cu_seqlens: Tensor | None = None
    chunk_size: int | None = None
    step: str = "token"
    activation: str = "gelu"
    residual_norm: bool = False
    max_grad_norm: float | None = None

    @classmethod
    def of(
        cls,
        tokens: Sequence[Tensor | None],
        state: MemoryState,
        *,
        init: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> MemoryCall:
        """The call for ``tokens`` (q, k, v and the three gates), a state and the op's keywords."""
        lists = map(list, (state.weights, state.momentum, state.anchor or (), init or ()))
        fields: list[Any] = [*tokens, *lists, state.position]
        return cls(*fields, **options)

    @property
    def tokens(self) -> tuple[Tensor | None, ...]:
        """Tokens and gates: ``q, k, v, lr, momentum, decay``."""
        return self[:6]

    @property
    def rows(self) -> int:
        """Number of sequences, each with a state of its own."""
        return self.weights[0].shape[0]

    @property
    def size(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size or max(self.k.shape[1], 1)

    @property
    def keeps_position(self) -> bool:
        """Whether it may stop inside a chunk: then its state has ``anchor`` and ``position``."""
        if self.step == "chunk" or self.chunk_size is None:
            return False
        given = self.position is not None or self.cu_seqlens is not None
        return given or self.k.shape[1] % self.chunk_size != 0

    def lengths(self) -> Tensor:
        """``[rows]`` int64: tokens of each row."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().long()
        return torch.full((self.rows,), self.k.shape[1], device=self.k.device)

    def next_position(self) -> Tensor:
        """``[rows]`` int64: where each row stands in its chunk after its last token."""
        if self.position is None:
            return self.lengths() % self.size
        plain = self.cu_seqlens is None
        return (self.position + (self.k.shape[1] if plain else self.lengths())) % self.size

    def first_gates(self) -> Tensor | None:
        """``[rows]``: where each ragged row's chunk gates begin; None if rows have as many."""
        if self.cu_seqlens is None:
            return None
        counts = chunk_counts(self.lengths(), self.size)
        return counts.cumsum(0) - counts

    def differentiable(self) -> tuple[Field, ...]:
        """The fields that have a gradient."""
        return self[:10]


class ReadCall(NamedTuple):
    """One call of the read ``M(q; W)``."""

    q: Tensor
    weights: list[Tensor]
    cu_seqlens: Tensor | None
    activation: str
    residual_norm: bool


class AlignedCall(NamedTuple):
    """One call of the aligned read; ``params`` are the fields of a :class:`ReadParams`."""

    hidden: Tensor
    token_index: Tensor
    state_index: Tensor
    weights: list[Tensor]
    params: list[Tensor]
    activation: str
    residual_norm: bool

    def differentiable(self) -> list[Tensor]:
        """The tensors that have a gradient."""
        return [self.hidden, *self.weights, *self.params]


class ScanCall(NamedTuple):
    """One call of the scan; ``state`` is weights and momentum, or empty."""

    update: Tensor
    momentum: Tensor | None
    decay: Tensor | None
    state: list[Tensor]
    cu_seqlens: Tensor | None


# --- sequences and their chunks -------------------------------------------------------------------


def bounds_of(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """``(b, begin, end)`` of every sequence in ``x`` ``[B, T, ...]``."""
    if cu_seqlens is None:
        return [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    return [(0, begin, end) for begin, end in pairwise(cu_seqlens.tolist())]


def n_chunks(tokens: int, chunk_size: int | None) -> int:
    """Chunks of a sequence, each with a gate if steps are chunks: one even when it is empty."""
    return 1 if chunk_size is None else max(1, -(-tokens // chunk_size))


def chunk_counts(lengths: Tensor, chunk_size: int) -> Tensor:
    """:func:`n_chunks` of every sequence, from their lengths ``[N]``."""
    return (-(-lengths // chunk_size)).clamp(min=1)


# --- calls as the fields of an operator -----------------------------------------------------------


def schema(call: type[Any]) -> str:
    """The fields of a call as arguments in the schema of a torch operator."""
    hints = get_type_hints(call)
    return ", ".join(f"{SCHEMA_TYPES[hints[name]]} {name}" for name in call._fields)


def tensors_of(fields: Iterable[Field]) -> list[Tensor]:
    """Every tensor of ``fields``, in order."""
    found: list[Tensor] = []
    for x in fields:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list):
            found += [t for t in x if isinstance(t, Tensor)]
    return found


def emptied(fields: Iterable[Field]) -> list[Any]:
    """``fields`` with … in the place of every tensor, for autograd to keep beside the tensors."""
    return [
        [...] * len(x) if isinstance(x, list) else ... if isinstance(x, Tensor) else x
        for x in fields
    ]


def refilled(fields: Iterable[Field], tensors: Iterable[Tensor]) -> list[Any]:
    """``fields`` with ``tensors`` in the places of theirs or of …, in order."""
    rest = iter(tensors)

    def fill(x: Field) -> Field:
        if isinstance(x, list):
            return [next(rest) for _ in x]
        return next(rest) if isinstance(x, Tensor) or x is ... else x

    return [fill(x) for x in fields]
