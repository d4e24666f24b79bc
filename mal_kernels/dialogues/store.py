"""All dialogues of an adapter, in memory and in a backing store."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import MALConfig
from ..errors import ArgumentError, CheckpointError, StoreError
from ..state import MemoryState
from .backing import (
    ABSENT,
    Change,
    KeyValueStore,
    SharedStore,
    Tombstones,
    is_there,
    revision_of,
    shared,
)
from .expiry import EXPIRY
from .files import write_file
from .history import History
from .locks import open_after_fork
from .options import check_option
from .queue import Queue
from .snapshot import EMPTY, Snapshot, pack_dialogues, unpack_dialogues
from .unconfirmed import Unconfirmed


class DialogueStore:
    """The dialogues of an adapter, as ``mal.dialogues``. Every change is made whole or not at all.

    Without a ``backing`` dialogues live in memory, and those used least recently are lost beyond
    the bounds. With one, memory only caches it: each turn begins with what is there, and is done
    when it is there. So any process may take any turn, a process killed at any moment leaves the
    last turn that was done, and a dialogue that was evicted comes back bit for bit; only
    :meth:`undo` does not reach behind an eviction. Of two turns of one dialogue at the same time
    the one that ends last raises StoreError and writes nothing, and so does one in which the
    dialogue was forgotten. Between processes the backing decides, which has to be a
    :class:`mal_kernels.store.SharedStore` for that, as those of a folder and of Redis are. Methods
    may be called from several threads at once.

    Args:
        config: of the adapter; a saved store can only be loaded under the same one.
        initial_state: returns the state of ``n`` dialogues in which nothing was said yet.
        weights: returns a digest of the weights that write the states; those of other weights are
            refused.
        undo_depth: turns per dialogue that can be undone.
        max_dialogues: most dialogues kept in memory; ``None`` for no bound. Those of the last turn
            always stay.
        max_bytes: most bytes of states in memory, with those for undo, in the same way.
        cache_seconds: after so long without use memory drops a dialogue that the backing has. No
            more than that, and than a ``ttl`` of the backing, a process keeps of a dialogue that
            another has forgotten.
        backing: a :class:`mal_kernels.store.KeyValueStore`, or ``None``.

    Raises:
        ArgumentError: an option is not valid, also when it is set later.

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

    backing: KeyValueStore | None
    _shared: SharedStore | None  # the same, or what decides in its place

    def __init__(
        self,
        config: MALConfig,
        initial_state: Callable[[int], MemoryState],
        weights: Callable[[], str | None] = lambda: None,
        *,
        undo_depth: int = 8,
        max_dialogues: int | None = None,
        max_bytes: int | None = None,
        cache_seconds: float = 600,
        backing: KeyValueStore | None = None,
    ) -> None:
        self.config, self.initial_state, self.weights = config, initial_state, weights
        self.undo_depth, self.max_dialogues, self.max_bytes = undo_depth, max_dialogues, max_bytes
        self.cache_seconds = cache_seconds
        self._histories: OrderedDict[str, History] = OrderedDict()  # used last, comes last
        self._erased, self._queue, self._unconfirmed = Tombstones(), Queue(), Unconfirmed()
        open_after_fork(self)
        self.backing = backing

    def new_locks(self) -> None:
        """The lock is open. It is never held while a backing store is asked."""
        self._lock = threading.RLock()

    def __setattr__(self, name: str, value: Any) -> None:
        check_option(name, value)
        if name != "backing":
            object.__setattr__(self, name, value)
            return
        store = None if value is None else shared(value)
        if value is not vars(self).get("backing"):
            self._leave_backing()
        vars(self).update(backing=value, _shared=store)
        if store is not None:
            EXPIRY.watch(self)

    def _leave_backing(self) -> None:
        """Marks what the process holds as being in no backing store yet."""
        self._unconfirmed = Unconfirmed()
        with self._lock:
            for name, history in self._histories.items():
                present = history.present._replace(revision=None)
                self._histories[name] = history._replace(
                    snapshots=(*history.snapshots[:-1], present)
                )

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy`` of an adapter: all but the locks."""
        left_out = ("_lock", "_queue", "_unconfirmed", "_shared")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _queue=Queue(), _unconfirmed=Unconfirmed())
        open_after_fork(self)
        self.backing = self.backing  # as a store that decides

    def __len__(self) -> int:
        """Dialogues in memory."""
        return len(self._histories)

    def __iter__(self) -> Iterator[str]:
        """Ids of the dialogues in memory, the one used least recently first."""
        with self._lock:
            return iter(list(self._histories))

    def __contains__(self, dialogue: object) -> bool:
        return isinstance(dialogue, str) and self._is_known(dialogue)

    @property
    def nbytes(self) -> int:
        """Bytes of all present states in memory, without those kept for undo."""
        with self._lock:
            return sum(history.present.nbytes for history in self._histories.values())

    # --- reading ----------------------------------------------------------------------------------

    def latest(self, dialogue: str) -> Snapshot:
        """Returns what is remembered of a dialogue now; empty for one that is not known.

        Raises:
            StoreError: the backing store cannot be reached, or has lost the dialogue.
            CheckpointError: what is there is damaged, foreign, of another configuration, or of
                other weights.
        """
        return self._history(dialogue).present

    def before(self, dialogue: str, mark: int) -> Snapshot | None:
        """Returns what was remembered when a named turn began, as long as it can be undone."""
        with self._lock:
            history = self._histories.get(dialogue)
        kept = history.snapshots if history else ()
        return next((snapshot for snapshot in reversed(kept) if mark not in snapshot.named), None)

    def _history(self, dialogue: str) -> History:
        """The history of a dialogue in memory, brought up to date with the backing store."""
        store = self._shared
        with self._lock:
            before, mark = self._histories.get(dialogue), self._erased.revision(dialogue)
            if store is None:
                self._touch(dialogue)
                return before or History.unknown(mark)
        revision = store.revision(dialogue)  # not under the lock: it may take its time
        if self._unconfirmed.found(dialogue, revision):
            before = self._histories.get(dialogue)
        if before is not None:
            if before.present.revision == revision:
                self._touch(dialogue)
                return before
            if before.present.revision is None and revision == ABSENT:  # not put there yet
                return before
            self._check_not_lost(dialogue, before, revision)
        found = self._fetch(store, dialogue, revision)
        with self._lock:
            now = self._histories.get(dialogue)
            unchanged = (now and now.snapshots) is (before and before.snapshots)
            if unchanged and mark == self._erased.revision(dialogue):
                self._histories.pop(dialogue, None)
                if is_there(found.present.revision):
                    self._keep({dialogue: found})
        return found

    def _fetch(self, store: SharedStore, dialogue: str, revision: str) -> History:
        blob = store.get(dialogue) if is_there(revision) else None
        if blob is None:  # also if it was erased just now: a turn on it will be refused
            return History.unknown(revision)
        where = f"dialogue {dialogue!r} in the backing store"
        found = unpack_dialogues(blob, self.config, self._like(), where, self.weights())
        if list(found) != [dialogue]:
            raise CheckpointError(
                f"{where} is that of {list(found)}; the store is damaged. Forget the dialogue, "
                "or restore the store from a copy."
            )
        return History.of([found[dialogue]._replace(revision=revision_of(blob))])

    def _check_not_lost(self, dialogue: str, before: History, revision: str) -> None:
        expires = getattr(self.backing, "ttl", None) is not None
        if revision == ABSENT and is_there(before.present.revision) and not expires:
            raise StoreError(
                f"dialogue {dialogue!r} is not in the backing store any more, and was not "
                "forgotten: the server has evicted or lost it. Restore the store from a copy, or "
                "forget the dialogue, which then begins anew."
            )

    def _is_known(self, dialogue: str) -> bool:
        return is_there(self.latest(dialogue).revision) or dialogue in self._histories

    def _touch(self, dialogue: str) -> None:
        with self._lock:
            history = self._histories.get(dialogue)
            if history is not None:
                self._histories[dialogue] = history._replace(used=time.monotonic())
                self._histories.move_to_end(dialogue)

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

    # --- changing ---------------------------------------------------------------------------------

    def queue(self, dialogues: Sequence[str], wait: float) -> AbstractContextManager[None]:
        """Within this context no other turn that queues is in ``dialogues``; see :class:`Queue`.

        Raises:
            StoreError: the turns before have not ended in ``wait`` seconds.
        """
        return self._queue.turn(dialogues, wait, self._shared)

    def commit(
        self, snapshots: Mapping[str, Snapshot], past: Mapping[str, Snapshot] | None = None
    ) -> None:
        """Makes ``snapshots`` the present of their dialogues, of all or of none.

        Args:
            snapshots: by id of the dialogue.
            past: what they were made from; ``None`` puts them after whatever is there now.

        Raises:
            StoreError: a dialogue is not as in ``past`` any more, or the backing store fails. If it
                fails after it has begun, each dialogue is still whole, and the turn can be played
                again: clips that were written are recognised.
        """
        keep, read = self.undo_depth + 1, past or {}
        self._replace(
            {name: read[name] if name in read else self.latest(name) for name in snapshots},
            snapshots,
            lambda history, present: (*history, present)[-keep:],
        )

    def undo(self, dialogues: Sequence[str]) -> None:
        """Drops the last turn of ``dialogues``, from all their memories.

        Raises:
            ArgumentError: none of them has a turn that can be undone, or not all that have turns.
            StoreError: a dialogue was changed meanwhile, or the backing store fails.
        """
        now = {name: self._history(name) for name in dialogues}
        before = {name: history.snapshots[-2:-1] for name, history in now.items()}
        stuck = [name for name, x in before.items() if not x and now[name].present.clips]
        if stuck or not any(before.values()):
            raise ArgumentError(
                f"dialogues {stuck or list(dialogues)} have no turn left to undo; at most the last "
                f"undo_depth={self.undo_depth} turns since they were loaded can be undone."
            )
        self._replace(
            {name: now[name].present for name, x in before.items() if x},
            {name: x[0] for name, x in before.items() if x},
            lambda history, present: (*history[:-2], present),
        )

    def _replace(
        self,
        past: Mapping[str, Snapshot],
        new: Mapping[str, Snapshot],
        history: Callable[[tuple[Snapshot, ...], Snapshot], Sequence[Snapshot]],
    ) -> None:
        """Puts ``new`` snapshots in the place of ``past`` ones, of all dialogues or of none.

        Args:
            past: what must be there now.
            new: what is to be there.
            history: makes the new history of a dialogue of the present one and what is new.
        """
        store, marks = self._shared, {name: self._erased.revision(name) for name in new}
        if store is None:
            self._remember(past, new, history, marks)
            return
        blobs = {x: pack_dialogues(self.config, {x: new[x]}, self.weights()) for x in new}
        new = {x: new[x]._replace(revision=revision_of(blob)) for x, blob in blobs.items()}
        remember = partial(self._remember, past, new, history, marks)
        self._unconfirmed.begin(new, remember)
        changes = {x: Change(past[x].revision or ABSENT, blob) for x, blob in blobs.items()}
        changed = store.swap(changes)
        if not changed:
            remember()
        self._unconfirmed.drop(new)
        _refuse(changed)

    def _remember(
        self,
        past: Mapping[str, Snapshot],
        new: Mapping[str, Snapshot],
        history: Callable[[tuple[Snapshot, ...], Snapshot], Sequence[Snapshot]],
        marks: Mapping[str, str],
    ) -> None:
        """The part of :meth:`_replace` in memory; ``marks`` are of deletions known before it."""
        with self._lock:
            erased = {x: History.unknown(self._erased.revision(x)) for x in new}
            now = {x: self._histories.get(x) or erased[x] for x in new}
            if self._shared is None:
                _refuse([x for x in new if not _same(now[x].present, past[x])])
            changed = {}
            for name, present in new.items():
                snapshots = now[name].snapshots
                if name in self._histories and snapshots[-1] is present:
                    continue  # another thread found it in the store
                if name not in self._histories or _same(snapshots[-1], present):
                    snapshots = (past[name],)  # evicted, or read by another thread since
                if marks[name] != self._erased.revision(name):
                    self._histories.pop(name, None)  # forgotten just now
                elif _same(snapshots[-1], past[name]):
                    changed[name] = History.of(history(snapshots, present))
            self._keep(changed)

    def detach(self, dialogues: Sequence[str]) -> None:
        """Cuts the states of ``dialogues`` from the autograd graph of the turns that wrote them."""
        with self._lock:
            self._histories.update(
                {
                    name: History.of([x.detach() for x in self._histories[name].snapshots])
                    for name in dialogues
                    if name in self._histories
                }
            )

    def forget(self, dialogues: Sequence[str] | None = None) -> None:
        """Erases ``dialogues`` (all, if ``None``) with everything kept for undo, and their backing.

        A turn that is running in one of them will fail, also if it is the first one. Another
        process drops what it has of them at its next turn of them, or after ``cache_seconds``.

        Raises:
            ArgumentError: ``None``, but there is a backing store, which cannot list what it has.
            StoreError: the backing store fails; memory is erased nevertheless.
        """
        failed = []
        for name in self._names(dialogues):
            self._drop(name)
            try:
                if self._shared is not None:
                    self._shared.delete(name)
            except Exception as error:
                failed.append((name, error))
            self._drop(name)  # what a read found before the store had erased it
        if failed:
            raise StoreError(
                f"dialogues {[name for name, _ in failed]} may still be in the backing store: "
                f"{failed[0][1]} Forget them again."
            ) from failed[0][1]

    def _drop(self, dialogue: str) -> None:
        with self._lock:
            self._erased.add(dialogue)
            self._unconfirmed.drop([dialogue])
            self._histories.pop(dialogue, None)

    def _names(self, dialogues: Sequence[str] | None) -> list[str]:
        if dialogues is not None:
            return [dialogues] if isinstance(dialogues, str) else list(dialogues)
        if self.backing is not None:
            raise ArgumentError(
                "dialogues is None, but a backing store cannot list what it has; pass their ids."
            )
        return list(self)

    # --- memory -----------------------------------------------------------------------------------

    def _keep(self, histories: Mapping[str, History]) -> None:
        if self._shared is not None:
            EXPIRY.watch(self)  # again after a fork
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

    def expire(self) -> float:
        """Drops from memory what was not used for ``cache_seconds``, and is in the backing store.

        Returns:
            Seconds until that is to be done again.
        """
        if self._shared is None:
            return 60.0
        limit = min(self.cache_seconds, getattr(self.backing, "ttl", None) or self.cache_seconds)
        oldest = time.monotonic() - limit
        self._unconfirmed.expire(oldest)
        with self._lock:
            for name, history in list(self._histories.items()):
                if history.used < oldest and history.present.revision is not None:
                    del self._histories[name]
        return max(0.1, min(60.0, limit / 8))

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | Path, dialogues: Sequence[str] | None = None) -> None:
        """Writes ``dialogues`` (all, if ``None``) as safetensors; what could be undone is not kept.

        The file can be read by its owner only.

        Raises:
            ArgumentError: an id in ``dialogues`` is not known; or ``None``, but there is a backing
                store, which cannot list what it has.
            StoreError: ``path`` cannot be written, or the backing store not be reached.
        """
        names = self._names(dialogues)
        unknown = [name for name in names if not self._is_known(name)]
        if unknown:
            raise ArgumentError(f"dialogues {unknown} are not known; pass some of {list(self)}.")
        snapshots = {name: self.latest(name) for name in names}
        write_file(path, pack_dialogues(self.config, snapshots, self.weights()), mode=0o600)

    def load(self, path: str | Path) -> list[str]:
        """Reads dialogues that :meth:`save` wrote, over those of the same id; returns their ids.

        States are bound to the weights that wrote them. Files of version 0.1.0 do not tell them,
        and are taken as those of this adapter.

        Raises:
            CheckpointError: the file is corrupt, foreign, of another configuration, or of other
                weights.
            StoreError: a dialogue was changed meanwhile, or the backing store fails.
        """
        new = unpack_dialogues(path, self.config, self._like(), str(path), self.weights())
        store = self._shared
        past = {
            name: self.latest(name)
            if store is None
            else EMPTY._replace(revision=store.revision(name))  # what is there may be damaged
            for name in new
        }
        self._replace(past, new, lambda history, present: (present,))
        return list(new)


def _same(now: Snapshot, past: Snapshot) -> bool:
    return now is past or (now.revision is not None and now.revision == past.revision)


def _refuse(changed: Sequence[str]) -> None:
    if changed:
        raise StoreError(
            f"dialogues {list(changed)} were changed or forgotten while this turn ran, which has "
            "not been written; play it again, after the other has ended."
        )
