"""Writes that a store may have made though nobody was told so: :class:`Unconfirmed`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from .snapshot import Snapshot


class Write(NamedTuple):
    """A write gives a dialogue a ``revision``; ``remember`` makes it the present in memory."""

    begun: float  # seconds of the monotonic clock
    revision: str | None
    remember: Callable[[], None]


class Unconfirmed:
    """An interrupt or a lost answer leaves a write of which only the store knows.

    If its revision is found there, memory catches up as if it had been told: a turn that is played
    again reads what it read, and can be undone.
    """

    def __init__(self) -> None:
        self._writes: dict[str, Write] = {}

    def begin(self, snapshots: Mapping[str, Snapshot], remember: Callable[[], None]) -> None:
        """A store is asked to write ``snapshots`` of dialogues."""
        now = time.monotonic()
        self._writes.update(
            {name: Write(now, x.revision, remember) for name, x in snapshots.items()}
        )

    def found(self, dialogue: str, revision: str) -> bool:
        """Whether the ``revision`` of a dialogue was begun here; then it is remembered."""
        write = self._writes.pop(dialogue, None)
        if write is None or write.revision != revision:
            return False
        write.remember()
        return True

    def drop(self, dialogues: Iterable[str]) -> None:
        """Whatever was begun for ``dialogues`` has ended, or must not be remembered."""
        for name in dialogues:
            self._writes.pop(name, None)

    def expire(self, oldest: float) -> None:
        """Drops what was begun before ``oldest``."""
        self.drop([name for name, write in list(self._writes.items()) if write.begun < oldest])
