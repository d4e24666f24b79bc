"""Dialogues in a Redis server, which several machines may share."""

from __future__ import annotations

import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..errors import ArgumentError, StoreError, needs
from .backing import ABSENT, CHECKSUM, ERASED, ERASED_SECONDS, HEAD, Change, revision_of
from .expiry import EXPIRY

T = TypeVar("T")
# KEYS: what to change. ARGV: seconds to keep it or 0, then what each must have, then the values.
# Returns the places in KEYS of those that have neither that nor what they are to get.
SWAP = r"""
local function revision(head, whole)
  local found = string.match(head, 'checksum\\": \\"(%x+)\\"')
  if found and #found == 64 then return found end
  if head == '' then return '' end
  if string.sub(head, 1, 7) == 'erased-' then return head end
  return redis.sha1hex(whole())
end
local n, changed = #KEYS, {}
for i, key in ipairs(KEYS) do
  local head, value = redis.call('GETRANGE', key, 0, 255), ARGV[1 + n + i]
  local now = revision(head, function() return redis.call('GET', key) end)
  local new = revision(string.sub(value, 1, 256), function() return value end)
  if now ~= ARGV[1 + i] and now ~= new then table.insert(changed, i) end
end
if #changed > 0 then return changed end
for i, key in ipairs(KEYS) do
  if ARGV[1] == '0' then redis.call('SET', key, ARGV[1 + n + i])
  else redis.call('SET', key, ARGV[1 + n + i], 'EX', ARGV[1]) end
end
return changed
"""
# KEYS: of a lease. ARGV: whose it must be, and milliseconds from now until it ends.
RENEW = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
"""
LEASE_SECONDS = 9.0  # until others have what a killed process held


class RedisStore:
    """Values in a Redis server, for several processes or machines; needs ``mal-kernels[redis]``.

    A value outlives the server only as its own settings say (``appendonly yes``), and memory that
    runs full only with ``maxmemory-policy noeviction``. Of a key that was erased a random number
    stays under its name for an hour.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://`` address of the server.
        prefix: of every key, to share a database with others.
        ttl: seconds after its last turn at which a dialogue is erased; ``None`` keeps it.
        options: passed to ``redis.Redis.from_url``; a server that does not answer for
            ``socket_timeout=5`` seconds is an error.

    Raises:
        ArgumentError: ``url``, ``ttl`` or an option is not valid.
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
        self._connect: Callable[[], Any] = lambda: redis.Redis.from_url(
            url, **options, decode_responses=False
        )
        self._checked = False
        try:
            self._redis = self._connect()
            self._redis.connection_pool.make_connection()  # which does not connect yet
        except (ValueError, TypeError, AttributeError) as error:
            known = _without_password(str(url))
            raise ArgumentError(
                f"url is {known!r}, or an option is not valid: {_without_password(str(error))}; "
                "pass redis://host:port/database and options of redis-py."
            ) from None  # the cause may tell the password

    def get(self, key: str) -> bytes | None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        value = self._call("get", lambda redis: redis.get(self._name(key)))
        return None if value is None or value.startswith(ERASED.encode()) else bytes(value)

    def revision(self, key: str) -> str:
        """See :class:`SharedStore`.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        name = self._name(key)
        head = self._call("getrange", lambda redis: redis.getrange(name, 0, HEAD - 1))
        if head.startswith(ERASED.encode()):
            return str(head.decode())
        if not CHECKSUM.search(head):  # nothing, or no dialogue of this version
            value = self.get(key)
            return ABSENT if value is None else revision_of(value)
        return revision_of(head)

    def put(self, key: str, value: bytes) -> None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        self._call("set", lambda redis: redis.set(self._name(key), value, ex=self.ttl))

    def swap(self, changes: Mapping[str, Change]) -> list[str]:
        """See :class:`SharedStore`.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        names, (old, new) = list(changes), zip(*changes.values(), strict=True)
        keys = [self._name(key) for key in names]
        changed = self._call(
            "swap", lambda redis: redis.eval(SWAP, len(keys), *keys, self.ttl or 0, *old, *new)
        )
        return [names[place - 1] for place in changed]

    def delete(self, key: str) -> None:
        """See :class:`KeyValueStore`.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        mark = f"{ERASED}{secrets.token_hex(8)}"
        self._call("delete", lambda redis: redis.set(self._name(key), mark, ex=ERASED_SECONDS))

    @contextmanager
    def turn(self, key: str, wait: float) -> Iterator[bool]:
        """See :class:`QueueingStore`; a random number under ``turn`` and the key, meanwhile.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        lease = _Lease(self, self._name(f"\0turn\0{key}"))
        try:
            yield lease.take(wait)
        finally:
            lease.end()

    def _name(self, key: str) -> bytes:
        return self.prefix.encode() + key.encode("utf-8", "surrogatepass")

    def _call(self, command: str, work: Callable[[Any], T]) -> T:
        try:
            result = work(self._redis)
            if not self._checked:  # once, after the server has answered
                self._checked = True
                self._warn_of_eviction()
            return result
        except self._error as error:
            raise StoreError(
                f"Redis refused {command} for one dialogue: {_without_password(str(error))}. Play "
                "the turn again when the server answers."
            ) from error
        except BaseException:
            # an answer may be on its way, and must not be taken for that of a later call
            self._redis = self._connect()
            raise

    def _warn_of_eviction(self) -> None:
        try:
            memory = self._redis.info("memory")
        except self._error:
            return  # not allowed, or not there, which the call will tell
        policy = memory.get("maxmemory_policy", "noeviction")
        if memory.get("maxmemory") and policy != "noeviction":
            warnings.warn(
                f"the Redis server drops dialogues when its memory is full (maxmemory-policy "
                f"{policy}): they then begin anew. Set maxmemory-policy noeviction.",
                stacklevel=4,
            )


class _Lease:
    """A name that one holder at a time has, until it ends it or is no more there to renew it."""

    def __init__(self, store: RedisStore, name: bytes) -> None:
        self._store, self._name = store, name
        self._holder, self._process = secrets.token_hex(16), os.getpid()
        self._taken = False

    def take(self, wait: float) -> bool:
        """Whether it is held now, which was waited for."""
        end, pause = time.monotonic() + wait, 0.005
        while not self._store._call(
            "set", lambda redis: redis.set(self._name, self._holder, nx=True, ex=int(LEASE_SECONDS))
        ):
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        self._taken = True
        EXPIRY.watch(self)
        return True

    def expire(self) -> float:
        """Renews it, unless it has ended or this is a copy in a forked process."""
        if not self._taken or os.getpid() != self._process:
            return 60.0
        self._until(LEASE_SECONDS)
        return LEASE_SECONDS / 3

    def end(self) -> None:
        """Lets others have it."""
        self._taken = False
        self._until(0.0)

    def _until(self, seconds: float) -> None:
        with suppress(StoreError):  # it ends by itself, and a swap keeps turns apart without it
            self._store._call(
                "eval",
                lambda redis: redis.eval(RENEW, 1, self._name, self._holder, round(1000 * seconds)),
            )


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", text)
