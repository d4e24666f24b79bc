"""What is remembered between the turns of a dialogue: memory states by dialogue and speaker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checkpoint import check_tensors, read_tensors, write_tensors
from .config import MALConfig
from .errors import ArgumentError, CheckpointError
from .state import MemoryState


class Snapshot(NamedTuple):
    """One dialogue after a turn; a value, never changed.

    ``states`` has one row per speaker, and ``None`` for the memory that all of them share.
    ``clips`` are the fingerprints of the clips written so far, ``None`` where one is unknown.
    """

    states: Mapping[str | None, MemoryState]
    clips: tuple[int | None, ...]

    def resent(self, clips: Sequence[int | None]) -> int:
        """How many of the first ``clips`` repeat the end of what was written, and in that order."""
        for n in range(min(len(clips), len(self.clips)), 0, -1):
            if None not in clips[:n] and tuple(clips[:n]) == self.clips[-n:]:
                return n
        return 0

    def detach(self) -> Snapshot:
        """The same values cut from the autograd graph."""
        return Snapshot({who: s.detach() for who, s in self.states.items()}, self.clips)


EMPTY = Snapshot({}, ())


class DialogueStore:
    """The dialogues of an adapter, as ``mal.dialogues``. Every change is made whole or not at all.

    Args:
        config: of the adapter; a saved store can only be loaded under the same one.
        initial_state: returns the state of ``n`` dialogues in which nothing was said yet.
        undo_depth: turns per dialogue that can be undone.
        max_dialogues: drops the dialogues written least recently beyond this number; ``None`` keeps
            all.

    Example:
        >>> from mal_kernels import MALAdapter, MALConfig
        >>> mal = MALAdapter(MALConfig(heads=2, head_dim=8, hidden_size=32))
        >>> with mal.dialogue("call-17") as dialogue:
        ...     dialogue.turns
        [0]
        >>> len(mal.dialogues)
        0
    """

    def __init__(
        self,
        config: MALConfig,
        initial_state: Callable[[int], MemoryState],
        *,
        undo_depth: int = 8,
        max_dialogues: int | None = None,
    ) -> None:
        self.config, self.initial_state = config, initial_state
        self.undo_depth, self.max_dialogues = undo_depth, max_dialogues
        # oldest first; the last snapshot of a dialogue is the present
        self._histories: dict[str, tuple[Snapshot, ...]] = {}

    def __len__(self) -> int:
        return len(self._histories)

    def __iter__(self) -> Iterator[str]:
        return iter(self._histories)

    def __contains__(self, dialogue: object) -> bool:
        return dialogue in self._histories

    @property
    def nbytes(self) -> int:
        """Bytes of all present states, without those kept for undo."""
        return sum(s.nbytes for h in self._histories.values() for s in h[-1].states.values())

    def latest(self, dialogue: str) -> Snapshot:
        """What is remembered of a dialogue now; empty for one that is not known."""
        return self._histories.get(dialogue, (EMPTY,))[-1]

    def gather(
        self, keys: Sequence[tuple[str, str | None]], device: torch.device | None = None
    ) -> MemoryState:
        """The states of ``(dialogue, speaker)`` keys as rows; initial where nothing was said."""
        fresh = self.initial_state(1)
        device = device or fresh.weights[0].device
        rows = [self.latest(name).states.get(who, fresh) for name, who in keys]
        return MemoryState.cat([row.to(device) for row in rows])

    def commit(self, snapshots: Mapping[str, Snapshot]) -> None:
        """Makes ``snapshots`` the present of their dialogues."""
        self._replace(
            {
                name: (*self._histories.get(name, (EMPTY,)), snapshot)[-self.undo_depth - 1 :]
                for name, snapshot in snapshots.items()
            }
        )

    def undo(self, dialogues: Sequence[str]) -> None:
        """Drops the last turn of ``dialogues``, from all their memories.

        Raises:
            ArgumentError: none of them has a turn that can be undone.
        """
        histories = {name: self._histories.get(name, ()) for name in dialogues}
        shorter = {name: h[:-1] for name, h in histories.items() if len(h) > 1}
        if not shorter:
            raise ArgumentError(
                f"dialogues {list(dialogues)} have no turn left to undo; at most the last "
                f"undo_depth={self.undo_depth} turns since they were loaded can be undone."
            )
        self._replace(shorter)

    def detach(self, dialogues: Sequence[str]) -> None:
        """Cuts the states of ``dialogues`` from the autograd graph of the turns that wrote them."""
        self._replace(
            {
                name: tuple(snapshot.detach() for snapshot in self._histories[name])
                for name in dialogues
                if name in self._histories
            }
        )

    def forget(self, dialogues: Sequence[str] | None = None) -> None:
        """Erases ``dialogues`` (all, if ``None``) with everything kept for undo."""
        gone = self._histories if dialogues is None else dialogues
        self._histories = {name: h for name, h in self._histories.items() if name not in gone}

    def _replace(self, changed: Mapping[str, tuple[Snapshot, ...]]) -> None:
        # built first, then put in place by one assignment, which no interrupt can split
        histories = {name: h for name, h in self._histories.items() if name not in changed}
        histories |= changed
        surplus = len(histories) - (self.max_dialogues or len(histories))
        self._histories = dict(list(histories.items())[max(surplus, 0) :])

    def save(self, path: str | Path, dialogues: Sequence[str] | None = None) -> None:
        """Writes ``dialogues`` (all, if ``None``) as safetensors; what could be undone is not kept.

        Raises:
            ArgumentError: an id in ``dialogues`` is not known.
        """
        names = list(self) if dialogues is None else list(dialogues)
        unknown = [name for name in names if name not in self]
        if unknown:
            raise ArgumentError(f"dialogues {unknown} are not known; pass some of {list(self)}.")
        present = {name: self.latest(name) for name in names}
        rows = [s.detach().to("cpu") for p in present.values() for s in p.states.values()]
        entries = [
            {"id": name, "speakers": list(p.states), "clips": p.clips}
            for name, p in present.items()
        ]
        write_tensors(
            path,
            "dialogues",
            _named(MemoryState.cat(rows)) if rows else {},
            {"config": self.config.state_signature(), "dialogues": entries},
        )

    def load(self, path: str | Path) -> list[str]:
        """Reads dialogues that :meth:`save` wrote, over those of the same id; returns their ids.

        Raises:
            CheckpointError: the file is corrupt, foreign, or of another configuration.
        """
        tensors, header = read_tensors(path, "dialogues")
        self._check_config(path, header.get("config"))
        entries = _entries(path, header.get("dialogues"))
        keys = [(entry["id"], who) for entry in entries for who in entry["speakers"]]
        like = self.initial_state(len(keys)).detach()
        check_tensors(path, tensors, _named(like) if keys else {})
        layers = range(len(like.weights) if keys else 0)
        every = MemoryState(
            tuple(tensors[f"weights.{i}"] for i in layers),
            tuple(tensors[f"momentum.{i}"] for i in layers),
        )
        states: dict[str, dict[str | None, MemoryState]] = {entry["id"]: {} for entry in entries}
        for row, (name, who) in enumerate(keys):
            states[name][who] = every.index_select(torch.tensor([row]))
        self._replace({e["id"]: (Snapshot(states[e["id"]], tuple(e["clips"])),) for e in entries})
        return list(states)

    def _check_config(self, path: str | Path, saved: object) -> None:
        mine = self.config.state_signature()
        theirs = saved if isinstance(saved, dict) else {}
        differs = [
            f"{name} is {theirs.get(name)!r} there and {mine.get(name)!r} here"
            for name in sorted(mine.keys() | theirs.keys())
            if theirs.get(name) != mine.get(name)
        ]
        if differs:
            raise CheckpointError(
                f"{path} holds states of another adapter: {'; '.join(differs)}. Load it with the "
                "adapter that wrote it, after attach()."
            )


class Dialogue:
    """A batch of dialogues, one per row of the host's batch; made by :meth:`MALAdapter.dialogue`.

    Args:
        store: where the states are kept.
        ids: id of each dialogue.
        speaker: who speaks; one name for all rows, or one per row; ``None`` where it is not known.

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
        self.ids = (ids,) if isinstance(ids, str) else tuple(ids)
        one_for_all = speaker is None or isinstance(speaker, str)
        self.speakers: tuple[str | None, ...] = (
            (speaker,) * len(self.ids) if one_for_all else tuple(speaker)  # type: ignore[arg-type, assignment]
        )
        if not self.ids or not all(isinstance(name, str) for name in self.ids):
            raise ArgumentError(f"ids is {ids!r}; pass a string, or a list of one string per row.")
        if len(set(self.ids)) < len(self.ids):
            raise ArgumentError(
                f"ids is {ids!r} with a repeated id, but each row writes its own dialogue; put the "
                "turns of one dialogue into one prompt, or into one call after the other."
            )
        if not all(who is None or isinstance(who, str) for who in self.speakers) or len(
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
        """Forgets all that was said in these dialogues."""
        self.store.forget(self.ids)

    def detach(self) -> None:
        """Truncates backpropagation: later losses no longer reach the turns up to now."""
        self.store.detach(self.ids)


def _named(state: MemoryState) -> dict[str, torch.Tensor]:
    names = [f"{field}.{i}" for field in ("weights", "momentum") for i in range(len(state.weights))]
    return dict(zip(names, (*state.weights, *state.momentum), strict=True))


def _entries(path: str | Path, entries: Any) -> list[dict[str, Any]]:
    """Checks the list of dialogues in the header of a saved store."""

    def is_entry(entry: Any) -> bool:
        return (
            isinstance(entry, dict)
            and isinstance(entry.get("id"), str)
            and isinstance(entry.get("speakers"), list)
            and all(who is None or isinstance(who, str) for who in entry["speakers"])
            and isinstance(entry.get("clips"), list)
            and all(clip is None or isinstance(clip, int) for clip in entry["clips"])
        )

    if not isinstance(entries, list) or not all(map(is_entry, entries)):
        raise CheckpointError(
            f"the list of dialogues in {path} is not one that mal_kernels writes; it is damaged. "
            "Save it again."
        )
    return entries
