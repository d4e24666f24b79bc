"""A thread that makes memory forget what a backing store may have erased: :data:`EXPIRY`."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from .locks import open_after_fork


class Cache(Protocol):
    """A cache is looked after by the thread."""

    def expire(self) -> float:
        """Drops what is too old; returns the seconds until the next look."""


class Expiry:
    """The thread, which begins with the first cache."""

    def __init__(self) -> None:
        self._caches: weakref.WeakSet[Cache] = weakref.WeakSet()
        open_after_fork(self)

    def new_locks(self) -> None:
        """Nothing is locked, and there is no thread: a fork does not take it along."""
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, cache: Cache) -> None:
        """Runs ``cache.expire()`` now and then while ``cache`` lives."""
        with self._lock:
            self._caches.add(cache)
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
        """Seconds until the next look; no cache is kept alive by the wait for it."""
        with self._lock:
            caches = list(self._caches)
        return min((cache.expire() for cache in caches), default=60.0)


EXPIRY = Expiry()
