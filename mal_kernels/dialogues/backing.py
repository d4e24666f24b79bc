"""Where dialogues are kept outside of the process: three methods, and three stores that have them.

Give one to ``mal.dialogues.backing``. Keys are ids of dialogues, any strings; values are what
:meth:`DialogueStore.save` writes, with one dialogue each.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..errors import ArgumentError, StoreError, needs
from .files import sync_folder, write_file


@runtime_checkable
class KeyValueStore(Protocol):
    """What a store of dialogues must do; methods may be called from several threads at once.

    An exception from any of them is passed on to the caller of the host, and no state changes.
    """

    def get(self, key: str) -> bytes | None:
        """The value last put under ``key``, or ``None``."""

    def put(self, key: str, value: bytes) -> None:
        """Replaces the value whole or not at all; it outlives the process on return."""

    def delete(self, key: str) -> None:
        """Erases the value, if there is one, so that it cannot be had back."""


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


class DirectoryStore:
    """One file per key, named by the SHA-256 of the key: no key leads out of the folder.

    A value is on the disk before :meth:`put` returns, and a process killed at any moment leaves the
    value before or after it. Files can be read by their owner only.

    Args:
        path: of the folder; made if it is not there.

    Raises:
        StoreError: the folder cannot be made.

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
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot make the folder {path}: {error}. Pass another.") from error

    def file(self, key: str) -> Path:
        """Where the value of ``key`` is, if there is one."""
        return self.path / f"{_digest(key)}.safetensors"

    def get(self, key: str) -> bytes | None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            return self.file(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {self.file(key)}: {error}.") from error

    def put(self, key: str, value: bytes) -> None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the file cannot be written.
        """
        write_file(self.file(key), value, mode=0o600)

    def delete(self, key: str) -> None:
        """See :class:`KeyValueStore`. Also what a killed process left half written under ``key``.

        Raises:
            StoreError: a file cannot be erased.
        """
        file = self.file(key)
        try:
            for path in (file, *self.path.glob(f".{file.name}.*")):
                path.unlink(missing_ok=True)
            sync_folder(self.path)
        except OSError as error:
            raise StoreError(f"cannot erase {file}: {error}. It may still be there.") from error


class RedisStore:
    """Values in a Redis server, for several processes or machines; needs ``mal-kernels[redis]``.

    A value outlives the server only as its own settings say (``appendonly yes``).

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://`` address of the server.
        prefix: of every key, to share a database with others.
        ttl: seconds after its last turn at which a dialogue is erased; ``None`` keeps it.
        options: passed to ``redis.Redis.from_url``; a server that does not answer for
            ``socket_timeout=5`` seconds is an error.

    Raises:
        ArgumentError: ``url`` or ``ttl`` is not valid.
        MissingPackage: redis-py is not installed.

    Example:
        >>> from mal_kernels.store import RedisStore
        >>> store = RedisStore("redis://localhost:6379/0", ttl=3600)  # connects at the first use
    """

    def __init__(
        self, url: str, *, prefix: str = "mal:", ttl: int | None = None, **options: Any
    ) -> None:
        with needs("redis", "RedisStore"):
            import redis
        if ttl is not None and (type(ttl) is not int or ttl <= 0):
            raise ArgumentError(f"ttl is {ttl!r}; pass whole seconds above 0, or None.")
        self.prefix, self.ttl, self._error = prefix, ttl, redis.RedisError
        options = {"socket_timeout": 5, "socket_connect_timeout": 5, **options}
        try:
            self._redis = redis.Redis.from_url(url, **options, decode_responses=False)
        except (ValueError, TypeError) as error:
            raise ArgumentError(
                f"url is {url!r}: {error}; pass redis://host:port/database and options of redis-py."
            ) from error

    def get(self, key: str) -> bytes | None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        return self._call("get", key)

    def put(self, key: str, value: bytes) -> None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        self._call("set", key, value, ex=self.ttl)

    def delete(self, key: str) -> None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        self._call("delete", key)

    def _call(self, command: str, key: str, *values: bytes, **options: Any) -> Any:
        name = self.prefix.encode() + key.encode("utf-8", "surrogatepass")
        try:
            return getattr(self._redis, command)(name, *values, **options)
        except self._error as error:
            raise StoreError(
                f"Redis refused {command} for one dialogue: {error}. Play the turn again when the "
                "server answers."
            ) from error


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
