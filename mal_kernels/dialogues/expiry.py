"""A thread that looks after what a store has in time: :data:`EXPIRY`.

Memory forgets what a backing store may have erased, and a lease is renewed while its turn runs.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from .locks import open_after_fork


class Watched(Protocol):
    """The thread looks after it."""

    def expire(self) -> float:
        """Drops or renews what is too old; returns the seconds until the next look."""


class Expiry:
    """The thread, which begins with the first that is watched."""

    def __init__(self) -> None:
        self._watched: weakref.WeakSet[Watched] = weakref.WeakSet()
        open_after_fork(self)

    def new_locks(self) -> None:
        """Nothing is locked, and there is no thread: a fork does not take it along."""
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, watched: Watched) -> None:
        """Runs ``watched.expire()`` now and then while ``watched`` lives."""
        with self._lock:
            self._watched.add(watched)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name="mal_kernels: expiry", daemon=True
                )
                self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            self._wake.wait(self._expire_all())

    def _expire_all(self) -> float:
        """Seconds until the next look; nothing is kept alive by the wait for it."""
        with self._lock:
            every = list(self._watched)
        return min((x.expire() for x in every), default=60.0)


EXPIRY = Expiry()
