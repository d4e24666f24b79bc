"""Which dialogue a call of the host belongs to, in the thread or asyncio task that makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from ..dialogues import Dialogue


class Scope(NamedTuple):
    """What the context managers of an adapter say about the calls made within them."""

    dialogue: Dialogue | None = None
    mask: Tensor | None = None
    enabled: bool = True


OUTSIDE = Scope()
# of every adapter that has one, in this thread or asyncio task
_SCOPES: ContextVar[Mapping[object, Scope]] = ContextVar("scopes", default=MappingProxyType({}))


class Scopes:
    """The scopes of one adapter: each thread and asyncio task sees the one that it is in.

    Attributes:
        dialogues: scopes that opened a dialogue, of all threads and tasks.
        masks: scopes that gave a mask, of all threads and tasks.
    """

    def __init__(self) -> None:
        self.dialogues: dict[object, Scope] = {}
        self.masks: dict[object, Scope] = {}

    def current(self) -> Scope:
        """The innermost scope of this thread or task."""
        return _SCOPES.get().get(self, OUTSIDE)

    @contextmanager
    def within(self, register: dict[object, Scope] | None = None, **says: Any) -> Iterator[None]:
        """Opens a scope inside the current one, and lists it in ``register`` while it is open."""
        outer, key = self.current(), object()
        scope = outer._replace(**says)
        if register is not None:
            register[key] = scope
        _SCOPES.set({**_SCOPES.get(), self: scope})
        try:
            yield
        finally:
            others = {owner: x for owner, x in _SCOPES.get().items() if owner is not self}
            # without an entry that would keep the dialogue alive
            _SCOPES.set(others if outer is OUTSIDE else {**others, self: outer})
            if register is not None:
                del register[key]
