"""Locks between threads and processes that an interrupt or a kill at any moment leaves open."""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import StoreError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
# of a system or file system without flock, such as Windows and some network folders
NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_INSTEAD = threading.RLock()
PATIENCE = 10.0  # seconds to wait for the lock of a folder, which is held for less than one
# objects with locks of their own, which a fork may find closed for ever in the child
_LOCKED: weakref.WeakSet[Any] = weakref.WeakSet()


def open_after_fork(owner: Any) -> None:
    """``owner.new_locks()`` runs now, and in every child that a fork makes of this process."""
    owner.new_locks()
    _LOCKED.add(owner)


def _after_fork() -> None:
    for owner in list(_LOCKED):
        owner.new_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class NamedLocks:
    """One lock per name, which is there while somebody uses it.

    Args:
        kind: makes a lock.
    """

    def __init__(self, kind: Callable[[], Any] = threading.RLock) -> None:
        self.kind = kind
        open_after_fork(self)

    def new_locks(self) -> None:
        """All locks are open."""
        self._lock = threading.Lock()
        self._locks: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def of(self, names: Iterable[str]) -> list[Any]:
        """The locks of ``names``, in the order in which to take them."""
        with self._lock:
            return [self._locks.setdefault(name, self.kind()) for name in sorted(set(names))]

    def holding(self, names: Iterable[str], work: Callable[[], T]) -> T:
        """Returns what ``work`` returns while the locks of ``names`` are held."""
        return _holding(self.of(names), work)

    @contextmanager
    def held(self, names: Iterable[str], wait: float) -> Iterator[bool]:
        """Within this context the locks of ``names`` are held, if they came in ``wait`` seconds."""
        end, held = time.monotonic() + wait, list[Any]()
        try:
            for lock in (locks := self.of(names)):
                if not lock.acquire(timeout=max(0.0, end - time.monotonic())):
                    break
                held.append(lock)
            yield len(held) == len(locks)
        finally:
            for lock in held:
                lock.release()


def _holding(locks: list[Any], work: Callable[[], T]) -> T:
    # not an ExitStack: no interrupt comes between a lock and its `with`
    if not locks:
        return work()
    with locks[0]:
        return _holding(locks[1:], work)


def lock_file(descriptor: int, wait: bool = True) -> bool:
    """Whether this process now has the lock of an open file, which the system opens when it ends.

    Where there are no locks, nothing is known about others: false without ``wait``.
    """
    try:
        return _flock(descriptor, wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return wait


def _flock(descriptor: int, wait: bool) -> bool:
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no flock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def unlock_file(descriptor: int) -> None:
    """Opens the lock, also if a forked child has the descriptor too."""
    if fcntl is not None:
        with suppress(OSError):  # there are no locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def lock_of_file(path: Path, wait: float) -> BinaryIO | None:
    """The open file ``path`` with its lock, or ``None`` if that was not open in ``wait`` seconds.

    It is made if it is not there. Who removes it has to have its lock.
    """
    end, pause = time.monotonic() + wait, 0.001
    while True:
        file = open(path, "ab", opener=partial(os.open, mode=0o600))  # noqa: SIM115
        try:
            free = _flock(file.fileno(), wait=False)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return file
        if free and os.fstat(file.fileno()).st_nlink:
            return file
        file.close()
        if time.monotonic() > end:
            return None
        if not free:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """Within this context there is a descriptor of the folder ``path``."""
    numbers = list[int]()
    try:
        numbers.extend(map(os.open, [path], [os.O_RDONLY]))  # no interrupt comes between
        yield numbers[0]
    finally:
        for number in numbers:
            os.close(number)


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Within this context no other thread or process has the lock of the folder ``path``.

    Where the system has no locks, only threads of this process are kept out.

    Raises:
        StoreError: another has it for 10 seconds.
        OSError: the folder cannot be opened.
    """
    with nullcontext(-1) if fcntl is None else open_folder(path) as folder:
        try:
            _wait_for(folder, path)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            with _INSTEAD:
                yield
            return
        try:
            yield
        finally:
            unlock_file(folder)


def _wait_for(descriptor: int, path: Path) -> None:
    end, pause = time.monotonic() + PATIENCE, 0.0001
    while not _flock(descriptor, wait=False):
        if time.monotonic() > end:
            raise StoreError(
                f"the folder {path} has been locked for {PATIENCE:.0f} seconds by another process; "
                "find out which one hangs, then try again."
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.005)
