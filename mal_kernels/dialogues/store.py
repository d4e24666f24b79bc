"""The dialogues of an adapter: states by dialogue and speaker, each turn whole or not at all."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import MALConfig
from ..errors import ArgumentError, CheckpointError, StoreError
from ..state import MemoryState
from .backing import KeyValueStore
from .files import revision, write_file
from .snapshot import EMPTY, Snapshot, pack_dialogues, unpack_dialogues


class _History(NamedTuple):
    """The snapshots of a dialogue, the present one last, and the bytes of all their states."""

    snapshots: tuple[Snapshot, ...]
    nbytes: int

    @classmethod
    def of(cls, snapshots: Sequence[Snapshot]) -> _History:
        # a silent speaker has the same state in several snapshots
        states = {id(state): state for x in snapshots for state in x.states.values()}
        return cls(tuple(snapshots), sum(state.nbytes for state in states.values()))


UNKNOWN = _History((EMPTY,), 0)


class DialogueStore:
    """The dialogues of an adapter, as ``mal.dialogues``. Every change is made whole or not at all.

    Without a ``backing`` dialogues live in memory, and those used least recently are lost beyond
    the bounds. With one, memory only caches it: each turn begins with what is there, and is done
    when it is there. So any process may take any turn, a process killed at any moment leaves the
    last turn that was done, and a dialogue that was evicted comes back bit for bit; only
    :meth:`undo` does not reach behind an eviction. Of two turns of one dialogue at the same time
    the one that ends last raises StoreError and writes nothing.

    Methods may be called from several threads at once.

    Args:
        config: of the adapter; a saved store can only be loaded under the same one.
        initial_state: returns the state of ``n`` dialogues in which nothing was said yet.
        undo_depth: turns per dialogue that can be undone.
        max_dialogues: most dialogues kept in memory; ``None`` for no bound. Those of the last turn
            always stay.
        max_bytes: most bytes of states in memory, with those for undo, in the same way.
        backing: a :class:`mal_kernels.store.KeyValueStore`, or ``None``.

    Example:
        >>> import tempfile
        >>> from mal_kernels import MALAdapter, MALConfig
        >>> from mal_kernels.store import DirectoryStore
        >>> mal = MALAdapter(MALConfig(heads=2, head_dim=8, hidden_size=32))
        >>> mal.dialogues.max_bytes = 2**30
        >>> mal.dialogues.backing = DirectoryStore(tempfile.mkdtemp())
        >>> with mal.dialogue("call-17") as dialogue:
        ...     dialogue.turns
        [0]
        >>> mal.dialogues.forget(["call-17"])  # in memory and in the folder
    """

    def __init__(
        self,
        config: MALConfig,
        initial_state: Callable[[int], MemoryState],
        *,
        undo_depth: int = 8,
        max_dialogues: int | None = None,
        max_bytes: int | None = None,
        backing: KeyValueStore | None = None,
    ) -> None:
        self.config, self.initial_state = config, initial_state
        self.undo_depth, self.max_dialogues, self.max_bytes = undo_depth, max_dialogues, max_bytes
        self.backing = backing
        self._histories: OrderedDict[str, _History] = OrderedDict()  # used last, comes last
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy`` of an adapter: all but the lock."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def __len__(self) -> int:
        """Dialogues in memory."""
        return len(self._histories)

    def __iter__(self) -> Iterator[str]:
        """Ids of the dialogues in memory, the one used least recently first."""
        with self._lock:
            return iter(list(self._histories))

    def __contains__(self, dialogue: object) -> bool:
        if isinstance(dialogue, str):
            self.latest(dialogue)  # fetches it, or drops what is gone from the backing store
        return dialogue in self._histories

    @property
    def nbytes(self) -> int:
        """Bytes of all present states in memory, without those kept for undo."""
        with self._lock:
            return sum(history.snapshots[-1].nbytes for history in self._histories.values())

    def latest(self, dialogue: str) -> Snapshot:
        """What is remembered of a dialogue now; empty for one that is not known.

        Raises:
            StoreError: the backing store cannot be reached.
            CheckpointError: what is there is damaged, foreign, or of another configuration.
        """
        stored = self._fetch(dialogue)  # not under the lock: it may take its time
        return self._history(dialogue, stored).snapshots[-1]

    def before(self, dialogue: str, mark: int) -> Snapshot | None:
        """What was remembered when a named turn began, as long as it can be undone."""
        with self._lock:
            kept = self._histories.get(dialogue, UNKNOWN).snapshots
        return next((snapshot for snapshot in reversed(kept) if mark not in snapshot.named), None)

    def _fetch(self, dialogue: str) -> bytes | None:
        return None if self.backing is None else self.backing.get(dialogue)

    def _history(self, dialogue: str, stored: bytes | None) -> _History:
        """Brings memory up to date with what is ``stored``."""
        where = f"dialogue {dialogue!r} in the backing store"
        now = None if stored is None else revision(stored, where)
        with self._lock:
            history = self._histories.get(dialogue, UNKNOWN)
            if self.backing is None or history.snapshots[-1].revision == now:
                if dialogue in self._histories:
                    self._histories.move_to_end(dialogue)
                return history
            if stored is None:  # erased by another process
                self._histories.pop(dialogue, None)
                return UNKNOWN
            found = unpack_dialogues(stored, self.config, self._like(), where)
            if list(found) != [dialogue]:
                raise CheckpointError(
                    f"{where} is that of {list(found)}; the store is damaged. Forget the dialogue, "
                    "or restore the store from a copy."
                )
            fetched = _History.of([found[dialogue]._replace(revision=now)])
            self._keep({dialogue: fetched})
            return fetched

    def _like(self) -> MemoryState:
        return self.initial_state(1).detach().to("cpu")

    def gather(
        self, keys: Sequence[tuple[str, str | None]], device: torch.device | None = None
    ) -> MemoryState:
        """The states of ``(dialogue, speaker)`` keys as rows; initial where nothing was said."""
        return self.rows([(self.latest(name), speaker) for name, speaker in keys], device)

    def rows(
        self, keys: Sequence[tuple[Snapshot, str | None]], device: torch.device | None = None
    ) -> MemoryState:
        """The states of speakers in snapshots, as :meth:`gather`."""
        fresh = self.initial_state(1)
        device = device or fresh.weights[0].device
        states = [snapshot.states.get(speaker, fresh) for snapshot, speaker in keys]
        return MemoryState.cat([state.to(device) for state in states])

    def commit(
        self, snapshots: Mapping[str, Snapshot], past: Mapping[str, Snapshot] | None = None
    ) -> None:
        """Makes ``snapshots`` the present of their dialogues, of all or of none.

        Args:
            snapshots: by id of the dialogue.
            past: what they were made from; ``None`` puts them after whatever is there now.

        Raises:
            StoreError: a dialogue is not as in ``past`` any more, or the backing store fails. If it
                fails to take back a part as well, each dialogue is still whole, and the turn can
                be played again: clips that were written are recognised.
        """
        with self._lock:
            stored = {name: self._fetch(name) for name in snapshots}
            now = {name: self._history(name, stored[name]).snapshots for name in snapshots}
            read = (past or {}).items()
            changed = [name for name, before in read if not _same(now[name][-1], before)]
            if changed:
                raise StoreError(
                    f"dialogues {changed} were changed or forgotten while this turn ran, which has "
                    "not been written; play it again, after the other has ended."
                )
            keep = self.undo_depth + 1
            self._replace({name: (*now[name], x)[-keep:] for name, x in snapshots.items()}, stored)

    def undo(self, dialogues: Sequence[str]) -> None:
        """Drops the last turn of ``dialogues``, from all their memories.

        Raises:
            ArgumentError: none of them has a turn that can be undone.
            StoreError: the backing store fails.
        """
        with self._lock:
            stored = {name: self._fetch(name) for name in dialogues}
            now = {name: self._history(name, stored[name]).snapshots for name in dialogues}
            shorter = {name: snapshots[:-1] for name, snapshots in now.items() if snapshots[1:]}
            if not shorter:
                raise ArgumentError(
                    f"dialogues {list(dialogues)} have no turn left to undo; at most the last "
                    f"undo_depth={self.undo_depth} turns since they were loaded can be undone."
                )
            self._replace(shorter, stored)

    def detach(self, dialogues: Sequence[str]) -> None:
        """Cuts the states of ``dialogues`` from the autograd graph of the turns that wrote them."""
        with self._lock:
            self._histories.update(
                {
                    name: _History.of([x.detach() for x in self._histories[name].snapshots])
                    for name in dialogues
                    if name in self._histories
                }
            )

    def forget(self, dialogues: Sequence[str] | None = None) -> None:
        """Erases ``dialogues`` (all, if ``None``) with everything kept for undo, and their backing.

        A turn that is running in one of them will fail.

        Raises:
            ArgumentError: ``None``, but there is a backing store, which cannot list what it has.
            StoreError: the backing store fails; memory is erased nevertheless.
        """
        names, failed = self._names(dialogues), []
        with self._lock:
            for name in names:
                self._histories.pop(name, None)
                try:
                    if self.backing is not None:
                        self.backing.delete(name)
                except Exception as error:
                    failed.append((name, error))
        if failed:
            raise StoreError(
                f"dialogues {[name for name, _ in failed]} may still be in the backing store: "
                f"{failed[0][1]} Forget them again."
            ) from failed[0][1]

    def _names(self, dialogues: Sequence[str] | None) -> list[str]:
        if dialogues is not None:
            return [dialogues] if isinstance(dialogues, str) else list(dialogues)
        if self.backing is not None:
            raise ArgumentError(
                "dialogues is None, but a backing store cannot list what it has; pass their ids."
            )
        return list(self)

    def _replace(
        self, changed: Mapping[str, Sequence[Snapshot]], stored: Mapping[str, bytes | None]
    ) -> None:
        """New histories of dialogues of which the backing store has ``stored``."""
        histories = dict(changed)
        if self.backing is not None:
            blobs = {x: pack_dialogues(self.config, {x: h[-1]}) for x, h in changed.items()}
            for name, blob in blobs.items():
                present = changed[name][-1]._replace(revision=revision(blob, name))
                histories[name] = (*changed[name][:-1], present)
            _put_all(self.backing, blobs, stored)
        self._keep({name: _History.of(history) for name, history in histories.items()})

    def _keep(self, histories: Mapping[str, _History]) -> None:
        self._histories.update(histories)  # one step, which no interrupt can split
        for name in histories:
            self._histories.move_to_end(name)
        surplus = len(self._histories) - len(histories)  # how many may go
        if self.max_dialogues is not None:
            for _ in range(min(surplus, len(self._histories) - self.max_dialogues)):
                self._histories.popitem(last=False)
                surplus -= 1
        if self.max_bytes is not None:
            total = sum(history.nbytes for history in self._histories.values())
            while surplus > 0 and total > self.max_bytes:
                total -= self._histories.popitem(last=False)[1].nbytes
                surplus -= 1

    def save(self, path: str | Path, dialogues: Sequence[str] | None = None) -> None:
        """Writes ``dialogues`` (all, if ``None``) as safetensors; what could be undone is not kept.

        Raises:
            ArgumentError: an id in ``dialogues`` is not known; or ``None``, but there is a backing
                store, which cannot list what it has.
            StoreError: ``path`` cannot be written, or the backing store not be reached.
        """
        snapshots, unknown = {}, []
        for name in self._names(dialogues):
            snapshots[name] = self.latest(name)
            if name not in self._histories:
                unknown.append(name)
        if unknown:
            raise ArgumentError(f"dialogues {unknown} are not known; pass some of {list(self)}.")
        write_file(path, pack_dialogues(self.config, snapshots))

    def load(self, path: str | Path) -> list[str]:
        """Reads dialogues that :meth:`save` wrote, over those of the same id; returns their ids.

        Raises:
            CheckpointError: the file is corrupt, foreign, or of another configuration.
            StoreError: the backing store fails.
        """
        snapshots = unpack_dialogues(path, self.config, self._like(), str(path))
        with self._lock:
            stored = {name: self._fetch(name) for name in snapshots}
            self._replace({name: (snapshot,) for name, snapshot in snapshots.items()}, stored)
        return list(snapshots)


def _same(now: Snapshot, past: Snapshot) -> bool:
    return now is past or (now.revision is not None and now.revision == past.revision)


def _put_all(
    store: KeyValueStore, blobs: Mapping[str, bytes], before: Mapping[str, bytes | None]
) -> None:
    """Puts all of ``blobs``, or what was there ``before`` again."""
    begun = []
    try:
        for name, blob in blobs.items():
            begun.append(name)
            store.put(name, blob)
    except BaseException:
        for name in begun:
            old = before[name]
            if old is None:
                store.delete(name)
            else:
                store.put(name, old)
        raise
