"""One dialogue through time: its snapshots, as far back as its turns can be undone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from .snapshot import EMPTY, Snapshot


class History(NamedTuple):
    """The snapshots of a dialogue, the present one last, the bytes of all their states, its use."""

    snapshots: tuple[Snapshot, ...]
    nbytes: int
    used: float  # when, in seconds of the monotonic clock

    @classmethod
    def of(cls, snapshots: Sequence[Snapshot]) -> History:
        """The history that ends with the last of ``snapshots``, used now."""
        # a silent speaker has the same state in several snapshots
        states = {id(state): state for x in snapshots for state in x.states.values()}
        nbytes = sum(state.nbytes for state in states.values())
        return cls(tuple(snapshots), nbytes, time.monotonic())

    @classmethod
    def unknown(cls, revision: str) -> History:
        """The history of a dialogue of which nothing is there; ``revision`` if it was erased."""
        return cls.of([EMPTY._replace(revision=revision) if revision else EMPTY])

    @property
    def present(self) -> Snapshot:
        """Returns what is remembered now."""
        return self.snapshots[-1]
