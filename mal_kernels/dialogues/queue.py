"""Turns of one dialogue that wait for each other: :class:`Queue`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ..errors import StoreError
from .backing import KeyValueStore, QueueingStore
from .locks import NamedLocks


class Queue:
    """A queue lets one turn of a dialogue in: of this process, and of others if the store can."""

    def __init__(self) -> None:
        self._locks = NamedLocks(threading.Lock)

    @contextmanager
    def turn(
        self, dialogues: Sequence[str], wait: float, store: KeyValueStore | None
    ) -> Iterator[None]:
        """Within this context no other turn that queues is in ``dialogues``.

        Args:
            dialogues: ids.
            wait: seconds, at most, until the turns before have ended.
            store: where other processes find the dialogues.

        Raises:
            StoreError: they have not.
        """
        end = time.monotonic() + wait
        with self._locks.held(dialogues, wait) as in_time, ExitStack() as others:
            if isinstance(store, QueueingStore):
                for name in sorted(dialogues):
                    left = max(0.0, end - time.monotonic())
                    in_time = in_time and others.enter_context(store.turn(name, left))
            if not in_time:
                raise StoreError(
                    f"another turn of dialogues {list(dialogues)} has not ended in {wait} seconds; "
                    "play this one again, or wait longer."
                )
            yield
