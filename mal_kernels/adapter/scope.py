"""Which dialogue a call of the host belongs to, in the thread or asyncio task that makes it."""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from threading import get_ident
from types import FrameType, MappingProxyType
from typing import Any

from torch import Tensor

from ..dialogues import Dialogue
from ..errors import ArgumentError, HostError


@dataclass(eq=False)
class Scope:
    """A scope is what an adapter's context managers say about the calls made within them.

    Attributes:
        outer: the scope that it was opened in.
        is_open: until its block has ended. A task or thread that was started inside of it with its
            context finds it there afterwards.
        held_by: the opening to leave by hand, where no ``with`` statement holds it.
    """

    dialogue: Dialogue | None = None
    mask: Tensor | None = None
    enabled: bool = True
    outer: Scope | None = None
    is_open: bool = True
    held_by: Opening | None = None

    def chain(self) -> Iterator[Scope]:
        """Yields this scope and those around it, from the inside."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer


OUTSIDE = Scope()
# of every adapter that has one, in this thread or asyncio task
_SCOPES: ContextVar[Mapping[object, Scope]] = ContextVar("scopes", default=MappingProxyType({}))


class Opening:
    """One block for which a scope is open, as a context manager that no interrupt leaves open.

    An interrupt can fall before the first instruction of ``__exit__``, which then never runs. So
    nothing but the block may hold this object: it leaves its scope also when it is dropped, and
    leaving what is half open or half left is right.
    """

    def __init__(
        self, scopes: Scopes, says: dict[str, Any], register: dict[Scope, int] | None
    ) -> None:
        self.scopes, self.says, self.register = scopes, says, register
        self.scope: Scope | None = None

    def __enter__(self) -> None:
        self.enter(sys._getframe(1))

    def enter(self, frame: FrameType | None, *, by_hand: bool = False) -> None:
        """Opens the scope for ``frame``, which says ``with``.

        Raises:
            ArgumentError: it is that of a generator.
        """
        _refuse_generators(frame)
        outer = self.scopes.innermost()
        inherited = next(scope for scope in outer.chain() if scope.is_open)
        held_by = self if by_hand else None
        scope = replace(inherited, outer=outer, held_by=held_by, **self.says)
        # not __del__, which runs after each block and would swallow an interrupt
        self.dropped = weakref.finalize(self, self.scopes.close, scope, self.register)
        self.scope = scope
        if self.register is not None:
            self.register[scope] = os.getpid()
        _SCOPES.set({**_SCOPES.get(), self.scopes: scope})

    def __exit__(self, *_: object) -> None:
        if self.scope is None:  # looked up after somebody entered by hand
            self.scopes.leave(self.says["dialogue"])
        self.leave()

    def leave(self) -> None:
        """Closes the scope, and takes it out of the thread or task that opened it."""
        if self.scope is not None:
            self.scopes.close(self.scope, self.register)
            self.dropped.detach()


class Scopes:
    """The scopes of one adapter: each thread and asyncio task sees the one that it is in.

    Attributes:
        host: what was attached, which a dialogue calls; ``None`` while nothing is.
        dialogues: open ``with`` blocks of dialogues, of all threads and tasks, with their process.
        masks: scopes that gave a mask, likewise.
    """

    def __init__(self) -> None:
        self.attached_to(None)
        self.dialogues: dict[Scope, int] = {}
        self.masks: dict[Scope, int] = {}
        # by thread: what a `with` statement holds from before it enters
        self._prepared: dict[int, weakref.ref[Opening]] = {}

    def attached_to(self, host: Any, on_open: Callable[[], None] | None = None) -> None:
        """Says what a dialogue calls, and what runs before one is opened or called."""
        self.host, self._on_open = host, on_open or _nothing

    def innermost(self) -> Scope:
        """The scope of this thread or task, which may be closed."""
        return _SCOPES.get().get(self, OUTSIDE)

    def current(self) -> Scope:
        """The scope that a call in this thread or task belongs to.

        Raises:
            ArgumentError: it is closed.
        """
        scope = self.innermost()
        if not scope.is_open:
            of = f"dialogue({list(scope.dialogue.ids)})" if scope.dialogue else "a context"
            raise ArgumentError(
                f"this task or thread was started inside {of}, which has ended since: the call "
                "would be a turn of nobody or of somebody else. Start it outside, or call "
                "dialogue.generate(...) or dialogue(...), which need no open context."
            )
        return scope

    def within(self, register: dict[Scope, int] | None = None, **says: Any) -> Opening:
        """A scope inside the current one, to be opened, and listed in ``register`` until left."""
        return Opening(self, says, register)

    def close(self, scope: Scope, register: dict[Scope, int] | None) -> None:
        """Closes ``scope``, and goes back to what was before it, if this is its thread or task."""
        scope.is_open, scope.held_by = False, None
        if register is not None:
            register.pop(scope, None)
        innermost = self.innermost()
        for inner in innermost.chain():  # left in another order than entered
            if inner.outer is scope:
                inner.outer = scope.outer
        if innermost is scope:
            others = {owner: x for owner, x in _SCOPES.get().items() if owner is not self}
            # without an entry that would keep the dialogue alive
            outer = scope.outer or OUTSIDE
            _SCOPES.set(others if outer is OUTSIDE else {**others, self: outer})

    def call(self, dialogue: Dialogue, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the host as a turn of ``dialogue``, whatever is open.

        Raises:
            HostError: the adapter is not attached.
        """
        if self.host is None:
            raise HostError("the adapter is not attached to a host; call attach(model) first.")
        self._on_open()
        with self.within(dialogue=dialogue):
            return getattr(self.host, method)(*args, **kwargs)

    def prepare(self, dialogue: Dialogue) -> Callable[..., None]:
        """Returns what a ``with`` statement holds from before it enters ``dialogue``, and calls."""
        opening = self.within(self.dialogues, dialogue=dialogue)
        self._prepared[get_ident()] = weakref.ref(opening)
        return opening.__exit__

    def enter(self, dialogue: Dialogue, frame: FrameType) -> None:
        """Opens what was prepared for ``dialogue``, or what its scope holds until left by hand."""
        self._on_open()
        prepared = self._prepared.pop(get_ident(), None)
        opening = prepared() if prepared else None
        by_hand = opening is None or opening.scope or opening.says["dialogue"] is not dialogue
        if opening is None or by_hand:
            opening = self.within(self.dialogues, dialogue=dialogue)
        opening.enter(frame, by_hand=bool(by_hand))

    def leave(self, dialogue: Dialogue) -> None:
        """Leaves what was opened by hand, as by an ``ExitStack``."""
        self._leave(lambda scope: scope.dialogue is dialogue)

    def disable(self, frame: FrameType) -> None:
        """Calls in the thread or task of ``frame`` are no turns, until :meth:`enable` is called."""
        if self.innermost().enabled:
            self.within(enabled=False).enter(frame, by_hand=True)

    def enable(self) -> None:
        """Ends what :meth:`disable` began."""
        self._leave(lambda scope: not scope.enabled)

    def _leave(self, is_wanted: Callable[[Scope], bool]) -> None:
        held = (x.held_by for x in self.innermost().chain() if is_wanted(x))
        opening = next(filter(None, held), None)
        if opening is not None:
            opening.leave()


def _nothing() -> None:
    """Runs before a dialogue is opened, where nothing is to be looked at."""


def _refuse_generators(frame: FrameType | None) -> None:
    """Raises where what opens a scope is a generator, whose caller would be inside it, too.

    One that contextlib runs is a context manager; then who says ``with`` to that one counts.
    """
    while frame is not None:
        caller, code = frame.f_back, frame.f_code
        generator = code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)
        if generator and not _of_contextlib(caller):
            raise ArgumentError(
                f"the generator {code.co_name}() opens a context of the adapter, which its caller "
                "and other generators would be inside of while it waits in a yield; call "
                "dialogue.generate(...) or dialogue(...), which need no open context, or move the "
                "block into a function that the generator calls."
            )
        if not generator and not _of_contextlib(frame):
            return
        frame = caller


def _of_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == "contextlib"
