"""One conversation, or a batch of them, as the user holds it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import FrameType
from typing import Any, Protocol

from ..errors import ArgumentError
from ..state import MemoryState
from .report import TurnReport
from .store import DialogueStore


class Scopes(Protocol):
    """The part of an adapter that knows whose turn a call of its host is."""

    def call(self, dialogue: Dialogue, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the host as a turn of ``dialogue``."""

    def prepare(self, dialogue: Dialogue) -> Callable[..., None]:
        """Returns what a ``with`` statement calls at its end, and holds until then."""

    def enter(self, dialogue: Dialogue, frame: FrameType) -> None:
        """Calls of the host in this thread or task are turns of ``dialogue`` from here on."""

    def leave(self, dialogue: Dialogue) -> None:
        """Ends what ``enter`` began, if no ``with`` statement does."""


class _Exit:
    """The ``__exit__`` of a dialogue, which each ``with`` statement gets one of its own of.

    The statement looks it up before it enters, and alone holds it: dropped, it has ended as well.
    """

    def __get__(self, dialogue: Dialogue | None, _: type[Dialogue]) -> Callable[..., None]:
        if dialogue is None:  # an ExitStack asks the class
            return lambda dialogue, *_: dialogue._scopes.leave(dialogue)
        return dialogue._scopes.prepare(dialogue)


class Dialogue:
    """A batch of dialogues, one per row of the host's batch; made by :meth:`MALAdapter.dialogue`.

    Call the host through it: ``dialogue.generate(...)``, or ``dialogue(...)`` for ``forward``. The
    owner travels with the call, in whatever thread, task, generator or streamer's thread it runs,
    and nothing is open before or after: this is the way for servers. In scripts ``with dialogue:``
    makes turns of it out of calls of the host itself.

    Args:
        store: where the states are kept.
        ids: id of each dialogue.
        speaker: who speaks; one name for all rows, or one per row; ``None`` where it is not known.
        turn_id: name of the turn; one for all rows, or one per row; ``None`` where it has none.
        remember_again: whether clips are written that were written before.
        wait: seconds, at most, that ``generate`` and a call wait for other waiting turns of these
            dialogues, also in other processes if the store can tell
            (:class:`~mal_kernels.store.QueueingStore`); ``None``: such a turn is refused when it is
            written.
        scopes: of the adapter whose host it calls.

    Attributes:
        last_turn: what the last turn of this object did, as :attr:`MALAdapter.last_turn`.

    Raises:
        ArgumentError: ids or speakers are not strings, repeat, or do not match in number.

    Example:
        >>> from mal_kernels import MALAdapter, MALConfig
        >>> from mal_kernels.testing import tiny_host, tiny_inputs
        >>> host = tiny_host("qwen2_audio")
        >>> mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(host)
        >>> dialogue = mal.dialogue(["call-17", "call-18"], speaker="A")
        >>> dialogue
        Dialogue('call-17' of 'A', 'call-18' of 'A')
        >>> dialogue.state.batch_size
        2
        >>> answer = dialogue.generate(**tiny_inputs(host, [[6], [4]]), max_new_tokens=2)
        >>> dialogue.turns
        [1, 1]
    """

    def __init__(
        self,
        store: DialogueStore,
        ids: str | Sequence[str],
        speaker: str | Sequence[str | None] | None = None,
        *,
        turn_id: str | Sequence[str | None] | None = None,
        remember_again: bool = False,
        wait: float | None = None,
        scopes: Scopes,
    ) -> None:
        self.store, self._scopes = store, scopes
        self.remember_again, self.wait = remember_again, wait
        if wait is not None and not (isinstance(wait, (int, float)) and wait >= 0):
            raise ArgumentError(f"wait is {wait!r}; pass seconds, or None not to queue.")
        self.last_turn: TurnReport | None = None
        self.ids: tuple[str, ...] = (ids,) if isinstance(ids, str) else _tuple(ids)
        self.speakers = _one_per_row(speaker, len(self.ids))
        self.turn_ids = _one_per_row(turn_id, len(self.ids))
        if not self.ids or not all(isinstance(name, str) for name in self.ids):
            raise ArgumentError(f"ids is {ids!r}; pass a string, or a list of one string per row.")
        if len(set(self.ids)) < len(self.ids):
            raise ArgumentError(
                f"ids is {ids!r} with a repeated id, but each row writes its own dialogue; put the "
                "turns of one dialogue into one prompt, or into one call after the other."
            )
        for argument, given, every in (
            ("speaker", speaker, self.speakers),
            ("turn_id", turn_id, self.turn_ids),
        ):
            if not all(x is None or isinstance(x, str) for x in every) or len(every) != len(
                self.ids
            ):
                raise ArgumentError(
                    f"{argument} is {given!r} for {len(self.ids)} dialogues; pass a string or "
                    "None, or a list with one of them per dialogue."
                )

    def __repr__(self) -> str:
        rows = zip(self.ids, self.speakers, strict=True)
        each = (f"{name!r}" + (f" of {who!r}" if who else "") for name, who in rows)
        return f"Dialogue({', '.join(each)})"

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``generate`` of the host, as one turn of this dialogue, and returns its answer.

        Raises:
            HostError: the adapter is not attached.
            StoreError: the turns before have not ended in ``wait`` seconds; the host has not run.
        """
        return self._call("generate", *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the host, as one turn of this dialogue, and returns its output.

        Raises:
            HostError: the adapter is not attached.
            StoreError: the turns before have not ended in ``wait`` seconds; the host has not run.
        """
        return self._call("__call__", *args, **kwargs)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        queue = nullcontext() if self.wait is None else self.store.queue(self.ids, self.wait)
        with queue:
            return self._scopes.call(self, method, *args, **kwargs)

    def __enter__(self) -> Dialogue:
        self._scopes.enter(self, sys._getframe(1))
        return self

    __exit__ = _Exit()

    @property
    def turns(self) -> list[int]:
        """Clips written so far, per dialogue."""
        return [len(self.store.latest(name).clips) for name in self.ids]

    @property
    def state(self) -> MemoryState:
        """Returns what the next turn reads: a row per dialogue, for its speaker if there is one."""
        return self.store.gather(list(zip(self.ids, self.speakers, strict=True)))

    def undo(self) -> None:
        """Drops the last turn of these dialogues; see :meth:`DialogueStore.undo`."""
        self.store.undo(self.ids)

    def reset(self) -> None:
        """The turns of these dialogues are forgotten."""
        self.store.forget(self.ids)

    def detach(self) -> None:
        """Truncates backpropagation: later losses no longer reach the turns up to now."""
        self.store.detach(self.ids)


def _one_per_row(given: Any, rows: int) -> tuple[str | None, ...]:
    return (given,) * rows if given is None or isinstance(given, str) else _tuple(given)


def _tuple(names: Any) -> tuple[Any, ...]:
    """A list or tuple as a tuple; an empty one, which is refused, for anything else."""
    return tuple(names) if isinstance(names, (list, tuple)) else ()
