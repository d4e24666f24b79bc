"""Dialogues in a folder, which several processes may share."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import StoreError
from .backing import ABSENT, CHECKSUM, ERASED, ERASED_SECONDS, HEAD, Change, revision_of
from .files import PartialFile, sync_folder
from .locks import folder_lock, lock_file, lock_of_file, unlock_file

SWEEP_SECONDS = 600  # between two looks for what killed processes left and for old tombstones
BATCH = ".batch"  # which half-written files are to take which places, all of them


class DirectoryStore:
    """One file per key, named by the SHA-256 of the key: no key leads out of the folder.

    Any number of processes of one machine may share the folder, if its file system has ``flock``.
    A value is on the disk before :meth:`put` returns, and a process killed at any moment leaves the
    value before or after it, of all dialogues of a batch.
    Files can be read by their owner only. Of a key that was erased an empty file with its SHA-256
    stays for an hour, and half of a file that a killed process was writing for ten minutes at most
    if the folder is in use, else until it is opened again.

    Args:
        path: of the folder; made if it is not there.

    Raises:
        StoreError: the folder cannot be made, or anybody may write in it.

    Example:
        >>> import tempfile
        >>> from mal_kernels.store import DirectoryStore
        >>> store = DirectoryStore(tempfile.mkdtemp())
        >>> store.put("../../call-17", b"state")
        >>> store.get("../../call-17")
        b'state'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._swept = 0.0
        try:
            new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in new:
                sync_folder(folder.parent)
            mode = self.path.stat().st_mode
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot make the folder {path}: {error}. Pass another.") from error
        if os.name == "posix" and mode & 0o077:
            self._check_mode(mode & 0o777)
        with suppress(StoreError):  # one that cannot be written can still be read
            self._sweep()

    def _check_mode(self, mode: int) -> None:
        remedy = f"run: chmod 700 {self.path}, or pass a folder of its own"
        if mode & 0o002:
            raise StoreError(f"anybody may write in the folder {self.path} ({mode:o}); {remedy}.")
        warnings.warn(
            f"others may look into the folder {self.path} ({mode:o}), where the name of a file "
            f"tells whether a dialogue of a known id exists; {remedy}.",
            stacklevel=4,
        )

    def file(self, key: str) -> Path:
        """Where the value of ``key`` is, if there is one."""
        return self.path / f"{_digest(key)}.safetensors"

    def _tombstone(self, key: str) -> Path:
        return self.path / f"{_digest(key)}.erased"

    def get(self, key: str) -> bytes | None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            self._finish_batch_of_another()
            return self.file(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {self.file(key)}: {error}.") from error

    def revision(self, key: str) -> str:
        """See :class:`SharedStore`.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            self._finish_batch_of_another()
            return self._revision(key)
        except OSError as error:
            raise StoreError(f"cannot read {self.file(key)}: {error}.") from error

    def _revision(self, key: str) -> str:
        try:
            with self.file(key).open("rb") as file:
                head = file.read(HEAD)
                return revision_of(head if CHECKSUM.search(head) else head + file.read())
        except FileNotFoundError:
            with suppress(FileNotFoundError):
                return f"{ERASED}{self._tombstone(key).stat().st_mtime_ns:x}"
            return ABSENT

    def put(self, key: str, value: bytes) -> None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the file cannot be written.
        """
        self._write({key: Change(ABSENT, value)}, compare=False)

    def swap(self, changes: Mapping[str, Change]) -> list[str]:
        """See :class:`SharedStore`.

        Raises:
            StoreError: a file cannot be written.
        """
        return self._write(changes, compare=True)

    def _write(self, changes: Mapping[str, Change], compare: bool) -> list[str]:
        partials: list[PartialFile] = []
        finished = False
        try:
            for key, change in changes.items():  # before the lock: it may take its time
                partials.append(PartialFile(self.file(key), 0o600))
                partials[-1].write(change.value)
            with self._alone():
                changed = [
                    key
                    for key, (old, value) in changes.items()
                    if compare and self._revision(key) not in (old, revision_of(value))
                ]
                if changed:
                    return changed
                if len(partials) > 1:
                    self._begin_batch(partials)
                    finished = True  # by whoever has the lock next, if not here
                    self._finish_batch()
                else:
                    for partial in partials:
                        partial.rename()
                    sync_folder(self.path)
        except OSError as error:
            what = ", ".join(str(self.file(key)) for key in changes)
            raise StoreError(
                f"cannot write {what}: {error}. Make room, or pass another path."
            ) from error
        finally:
            for partial in partials:
                partial.close() if finished else partial.discard()
        self._sweep(now=False)
        return []

    def _begin_batch(self, partials: list[PartialFile]) -> None:
        moves = {partial.path.name: partial.target.name for partial in partials}
        journal = PartialFile(self.path / BATCH, 0o600)
        try:
            journal.write(json.dumps(moves).encode())
            sync_folder(self.path)
            journal.rename()
        finally:
            journal.discard()
        sync_folder(self.path)

    def _finish_batch(self) -> None:
        """All files of a batch take their places, also of one whose process was killed."""
        try:
            moves = json.loads((self.path / BATCH).read_bytes())
        except FileNotFoundError:
            return
        for partial, target in moves.items():
            with suppress(FileNotFoundError):  # it has its place already
                (self.path / partial).replace(self.path / target)
        sync_folder(self.path)
        (self.path / BATCH).unlink(missing_ok=True)

    def _finish_batch_of_another(self) -> None:
        if (self.path / BATCH).exists():
            with self._alone():
                pass

    def delete(self, key: str) -> None:
        """See :class:`KeyValueStore`. Also what a killed process left half written under ``key``.

        Raises:
            StoreError: a file cannot be erased.
        """
        file, tombstone = self.file(key), self._tombstone(key)
        try:
            with self._alone():
                # empty, so that there is room for it on a full disk
                tombstone.touch(mode=0o600)
                now = time.time_ns()
                os.utime(tombstone, ns=(now, now))
                file.unlink(missing_ok=True)
                for partial in self.path.glob(f".{file.name}.*"):
                    _remove_if_left_over(partial)
                sync_folder(self.path)
        except OSError as error:
            raise StoreError(f"cannot erase {file}: {error}. It may still be there.") from error
        self._sweep(now=False)

    @contextmanager
    def turn(self, key: str, wait: float) -> Iterator[bool]:
        """See :class:`QueueingStore`; ``.<SHA-256 of the key>.turn`` is there meanwhile, empty.

        Raises:
            StoreError: the file cannot be made.
        """
        path = self.path / f".{_digest(key)}.turn"
        try:
            lock = lock_of_file(path, wait)
        except OSError as error:
            raise StoreError(f"cannot lock {path}: {error}.") from error
        try:
            yield lock is not None
        finally:
            if lock is not None:
                with lock:
                    path.unlink(missing_ok=True)
                    unlock_file(lock.fileno())

    def _sweep(self, now: bool = True) -> None:
        """Removes old tombstones and what killed processes left, now or if it is time to."""
        if not now and time.monotonic() - self._swept < SWEEP_SECONDS:
            return
        self._swept = time.monotonic()
        oldest = time.time() - ERASED_SECONDS
        try:
            with self._alone(), os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.startswith(".") and entry.name != BATCH:
                        _remove_if_left_over(Path(entry.path))
                    elif entry.name.endswith(".erased") and entry.stat().st_mtime < oldest:
                        Path(entry.path).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot tidy up {self.path}: {error}.") from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within this context nobody else changes the folder, and no batch is half done."""
        with folder_lock(self.path):
            self._finish_batch()
            yield


def _remove_if_left_over(partial: Path) -> None:
    """Removes a half-written file, unless its process is still at it."""
    with suppress(FileNotFoundError), partial.open("rb") as file:
        if lock_file(file.fileno(), wait=False):
            partial.unlink()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
