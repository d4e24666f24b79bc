"""Where dialogues are kept outside of the process: what a store must do, and one in memory.

Give one to ``mal.dialogues.backing``. Keys are ids of dialogues, any strings; values are what
:meth:`DialogueStore.save` writes, with one dialogue each.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from ..errors import ArgumentError
from .locks import NamedLocks

HEAD = 256  # bytes of a value in which its checksum stands
CHECKSUM = re.compile(rb'checksum\\": \\"([0-9a-f]{64})\\"')
ABSENT = ""  # the revision of what was never there
ERASED = "erased-"  # begins the revision of what was
ERASED_SECONDS = 3600  # how long that is known: a turn that takes longer is not protected


@runtime_checkable
class KeyValueStore(Protocol):
    """A store keeps bytes by key; its methods may be called from several threads at once.

    With these three methods a store serves one process; with those of :class:`SharedStore` any
    number. An exception from any of them is passed on to the caller of the host, and no state
    changes.
    """

    def get(self, key: str) -> bytes | None:
        """The value last put under ``key``, or ``None``."""

    def put(self, key: str, value: bytes) -> None:
        """Replaces the value whole or not at all; it outlives the process on return."""

    def delete(self, key: str) -> None:
        """Erases the value, if there is one, so that it cannot be had back."""


class Change(NamedTuple):
    """A ``value`` that may take the place of what is there if that has the revision ``old``."""

    old: str
    value: bytes


@runtime_checkable
class SharedStore(KeyValueStore, Protocol):
    """A shared store serves several processes: it decides whose turn counts."""

    def revision(self, key: str) -> str:
        """Text that tells apart all that was ever under ``key``; see :func:`revision_of`.

        Of a key that was never there it is empty. Of one that :meth:`delete` erased it begins with
        ``erased-`` and differs from deletion to deletion, for an hour at least, also if nothing
        was there: a turn that began before the deletion is refused by it.
        """

    def swap(self, changes: Mapping[str, Change]) -> list[str]:
        """Puts all values at once, or none, whatever happens to this process.

        Returns:
            Keys that have neither the revision expected nor that of the new value, which a call
            that is tried again finds. If there are any, nothing was put.
        """


@runtime_checkable
class QueueingStore(SharedStore, Protocol):
    """A queueing store lets turns of one dialogue wait for each other between processes.

    What it cannot keep apart, as when a lock is lost with its server, ``swap`` still does.
    """

    def turn(self, key: str, wait: float) -> AbstractContextManager[bool]:
        """Within this context nobody else who asks has ``key``; false if not in ``wait`` seconds.

        It ends with its process, in seconds.
        """


def revision_of(value: bytes) -> str:
    """The checksum in the first bytes of a saved dialogue; of other bytes, their SHA-1."""
    found = CHECKSUM.search(value[:HEAD])
    return found[1].decode() if found else hashlib.sha1(value, usedforsecurity=False).hexdigest()


def is_there(revision: str | None) -> bool:
    """Whether it is the revision of a value."""
    return bool(revision) and not str(revision).startswith(ERASED)


class Tombstones:
    """Keys that were erased in the last hour."""

    def __init__(self) -> None:
        self._marks: dict[str, tuple[float, str]] = {}  # the oldest first

    def add(self, key: str) -> None:
        """``key`` was erased now."""
        now = time.monotonic()
        self._marks.pop(key, None)
        self._marks[key] = (now, f"{ERASED}{secrets.token_hex(8)}")
        for old, (when, _) in list(self._marks.items()):
            if now - when < ERASED_SECONDS:
                break
            self._marks.pop(old, None)

    def revision(self, key: str) -> str:
        """The revision of a ``key`` under which there is nothing."""
        return self._marks.get(key, (0.0, ABSENT))[1]


class OneProcess:
    """A store of three methods as a :class:`SharedStore`, as long as no other process writes it."""

    def __init__(self, store: KeyValueStore) -> None:
        self.store = store
        self._locks, self._erased = NamedLocks(), Tombstones()

    def get(self, key: str) -> bytes | None:
        """See :class:`KeyValueStore`."""
        return self.store.get(key)

    def put(self, key: str, value: bytes) -> None:
        """See :class:`KeyValueStore`."""
        self._locks.holding([key], lambda: self.store.put(key, value))

    def delete(self, key: str) -> None:
        """See :class:`KeyValueStore`."""

        def erase() -> None:
            self._erased.add(key)
            self.store.delete(key)

        self._locks.holding([key], erase)

    def revision(self, key: str) -> str:
        """See :class:`SharedStore`."""
        return self._revision(key, self.get(key))

    def _revision(self, key: str, value: bytes | None) -> str:
        return self._erased.revision(key) if value is None else revision_of(value)

    def swap(self, changes: Mapping[str, Change]) -> list[str]:
        """See :class:`SharedStore`; whole or not at all as far as ``put`` does not fail twice."""
        return self._locks.holding(changes, lambda: self._swap(changes))

    def _swap(self, changes: Mapping[str, Change]) -> list[str]:
        before = {key: self.get(key) for key in changes}
        changed = [
            key
            for key, (old, value) in changes.items()
            if self._revision(key, before[key]) not in (old, revision_of(value))
        ]
        if changed:
            return changed
        begun = []
        try:
            for key, (_, value) in changes.items():
                begun.append(key)
                self.store.put(key, value)
        except BaseException:
            for key in begun:
                self._take_back(key, changes[key].value, before[key])
            raise
        return []

    def _take_back(self, key: str, value: bytes, before: bytes | None) -> None:
        if self.get(key) != value:
            return  # it was not put, or another process has been here
        if before is None:
            self.store.delete(key)
        else:
            self.store.put(key, before)


# by the id of a store, which is alive as long as what is found here
_SHARED: weakref.WeakValueDictionary[int, OneProcess] = weakref.WeakValueDictionary()


def shared(store: KeyValueStore) -> SharedStore:
    """``store`` itself, or what makes it decide within this process, the same every time.

    Raises:
        ArgumentError: it is no store.
    """
    if isinstance(store, SharedStore):
        return store
    if not isinstance(store, KeyValueStore):
        raise ArgumentError(
            f"backing is {str(store)[:80]!r}; pass a store of mal_kernels.store, such as "
            "DirectoryStore(path) or RedisStore(url), or None."
        )
    if not isinstance(store, MemoryStore):
        warnings.warn(
            f"{type(store).__name__} has get, put and delete but no revision and swap: use it from "
            "one process only, or add them (mal_kernels.store.SharedStore).",
            stacklevel=4,
        )
    return _SHARED.setdefault(id(store), OneProcess(store))


class MemoryStore:
    """Values in this process: for tests, and for states packed out of a GPU's memory.

    Example:
        >>> from mal_kernels.store import MemoryStore
        >>> store = MemoryStore()
        >>> store.put("call-17", b"state")
        >>> store.get("call-17"), store.get("call-18")
        (b'state', None)
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        """See :class:`KeyValueStore`."""
        return self.values.get(key)

    def put(self, key: str, value: bytes) -> None:
        """See :class:`KeyValueStore`."""
        self.values[key] = value

    def delete(self, key: str) -> None:
        """See :class:`KeyValueStore`."""
        self.values.pop(key, None)
