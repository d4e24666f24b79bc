"""A thread that looks after what a store has in time: :data:`EXPIRY`.

Memory forgets what a backing store may have erased, and a lease is renewed while its turn runs.
"""

from __future__ import annotations

import _thread
import threading
import weakref
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol

from .locks import open_after_fork


class Watched(Protocol):
    """The thread looks after it."""

    def expire(self) -> float:
        """Drops or renews what is too old; returns the seconds until the next look."""


class Expiry:
    """The thread, which begins with the first that is watched.

    A turn takes no lock here, and calls no Event or Thread: an interrupt inside of one leaves its
    lock closed, for ever.
    """

    def __init__(self) -> None:
        self._watched: dict[int, weakref.ref[Watched]] = {}  # by id
        open_after_fork(self)

    def new_locks(self) -> None:
        """There is no thread: a fork does not take it along."""
        self._lives = threading.Lock()  # held by the thread
        self._wake: SimpleQueue[None] = SimpleQueue()

    def watch(self, watched: Watched) -> None:
        """Runs ``watched.expire()`` now and then while ``watched`` lives."""
        known = self._watched.get(id(watched), lambda: None)() is watched
        self._watched[id(watched)] = weakref.ref(watched)
        if not self._lives.locked():
            _thread.start_new_thread(self._run, (self._lives, self._wake))
        elif not known:
            self._wake.put(None)

    def _run(self, lives: threading.Lock, wake: SimpleQueue[None]) -> None:
        if not lives.acquire(blocking=False):
            return  # another began at the same time
        try:
            while True:
                with suppress(Empty):
                    wake.get(timeout=self._expire_all())
        finally:
            lives.release()  # the next watch begins another

    def _expire_all(self) -> float:
        """Seconds until the next look; nothing is kept alive by the wait for it."""
        wait = 60.0
        for key, reference in list(self._watched.items()):
            watched = reference()
            if watched is not None:
                wait = min(wait, watched.expire())
            elif self._watched.get(key) is reference:  # not another of the same id
                self._watched.pop(key, None)
        return wait


EXPIRY = Expiry()
