"""One conversation, or a batch of them, as the user holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError
from ..state import MemoryState
from .report import TurnReport
from .store import DialogueStore


class Dialogue:
    """A batch of dialogues, one per row of the host's batch; made by :meth:`MALAdapter.dialogue`.

    Args:
        store: where the states are kept.
        ids: id of each dialogue.
        speaker: who speaks; one name for all rows, or one per row; ``None`` where it is not known.

    Attributes:
        last_turn: what the last turn in this context did, as :attr:`MALAdapter.last_turn`.

    Raises:
        ArgumentError: ids or speakers are not strings, repeat, or do not match in number.

    Example:
        >>> from mal_kernels import MALAdapter, MALConfig
        >>> mal = MALAdapter(MALConfig(heads=2, head_dim=8, hidden_size=32))
        >>> with mal.dialogue(["call-17", "call-18"], speaker="A") as dialogue:
        ...     dialogue.ids, dialogue.speakers, dialogue.state.batch_size
        (('call-17', 'call-18'), ('A', 'A'), 2)
    """

    def __init__(
        self,
        store: DialogueStore,
        ids: str | Sequence[str],
        speaker: str | Sequence[str | None] | None = None,
    ) -> None:
        self.store = store
        self.last_turn: TurnReport | None = None
        self.ids: tuple[str, ...] = (ids,) if isinstance(ids, str) else _tuple(ids)
        one_for_all = speaker is None or isinstance(speaker, str)
        self.speakers: tuple[str | None, ...] = (
            (speaker,) * len(self.ids) if one_for_all else _tuple(speaker)  # type: ignore[assignment]
        )
        if not self.ids or not all(isinstance(name, str) for name in self.ids):
            raise ArgumentError(f"ids is {ids!r}; pass a string, or a list of one string per row.")
        if len(set(self.ids)) < len(self.ids):
            raise ArgumentError(
                f"ids is {ids!r} with a repeated id, but each row writes its own dialogue; put the "
                "turns of one dialogue into one prompt, or into one call after the other."
            )
        if not all(x is None or isinstance(x, str) for x in self.speakers) or len(
            self.speakers
        ) != len(self.ids):
            raise ArgumentError(
                f"speaker is {speaker!r} for {len(self.ids)} dialogues; pass a string or None, or "
                "a list with one of them per dialogue."
            )

    @property
    def turns(self) -> list[int]:
        """Clips written so far, per dialogue."""
        return [len(self.store.latest(name).clips) for name in self.ids]

    @property
    def state(self) -> MemoryState:
        """What the next turn reads: one row per dialogue, for its speaker if there is one."""
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


def _tuple(names: Any) -> tuple[Any, ...]:
    """A list or tuple as a tuple; an empty one, which is refused, for anything else."""
    return tuple(names) if isinstance(names, (list, tuple)) else ()
