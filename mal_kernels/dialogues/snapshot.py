"""A snapshot is what a dialogue remembers at one time, in the process and in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import MALConfig
from ..errors import CheckpointError
from ..state import MemoryState
from .files import pack, read_tensors

KIND = "dialogues"


class Snapshot(NamedTuple):
    """One dialogue after a turn; a value, never changed.

    ``states`` has one row per speaker, and ``None`` for the memory that all of them share.
    ``clips`` are the fingerprints of the clips written so far, ``None`` where one is unknown: the
    one part that grows with the turns, by some 40 bytes a clip in memory and 20 in a file, and so
    do ``named``, hashes of the names of turns that have one.
    ``revision`` is that of its place in the backing store, see :class:`SharedStore`; ``None`` while
    it was not put there.
    """

    states: Mapping[str | None, MemoryState]
    clips: tuple[int | None, ...]
    revision: str | None = None
    named: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all its states."""
        return sum(state.nbytes for state in self.states.values())

    def resent(self, clips: Sequence[int | None]) -> int:
        """How many of the first ``clips`` repeat the end of what was written, and in that order."""
        for n in range(min(len(clips), len(self.clips)), 0, -1):
            if None not in clips[:n] and tuple(clips[:n]) == self.clips[-n:]:
                return n
        return 0

    def detach(self) -> Snapshot:
        """Returns the values cut from the autograd graph."""
        return self._replace(states={speaker: s.detach() for speaker, s in self.states.items()})


EMPTY = Snapshot({}, ())


def pack_dialogues(
    config: MALConfig, snapshots: Mapping[str, Snapshot], weights: str | None = None
) -> bytes:
    """``snapshots``, by id of the dialogue, as the bytes of a safetensors file.

    Args:
        config: of the adapter that wrote them.
        snapshots: by id of the dialogue.
        weights: digest of the weights that wrote them, if it is known.
    """
    rows = [s.detach().to("cpu") for x in snapshots.values() for s in x.states.values()]
    entries = [
        {"id": name, "speakers": list(x.states), "clips": x.clips}
        | ({"named": x.named} if x.named else {})
        for name, x in snapshots.items()
    ]
    header: dict[str, Any] = {"config": config.state_signature(), "dialogues": entries}
    if weights is not None:
        header["weights"] = weights
    return pack(KIND, _named(MemoryState.cat(rows)) if rows else {}, header)


def unpack_dialogues(
    source: str | Path | bytes,
    config: MALConfig,
    like: MemoryState,
    name: str,
    weights: str | None = None,
) -> dict[str, Snapshot]:
    """The inverse of :func:`pack_dialogues`.

    Args:
        source: a path, or the bytes.
        config: of the adapter that asks.
        like: a state of one row, of that adapter.
        name: of the source, for errors.
        weights: digest of the weights of that adapter, if it is known.

    Raises:
        CheckpointError: the source is corrupt, foreign, of another configuration, or of other
            weights.
    """

    def expected(header: dict[str, Any]) -> dict[str, torch.Tensor]:
        _check_config(name, header.get("config"), config.state_signature())
        _check_weights(name, header.get("weights"), weights)
        rows = sum(len(entry["speakers"]) for entry in _entries(name, header.get("dialogues")))
        return _named(like.map(lambda t: t[0].expand(rows, *t.shape[1:]))) if rows else {}

    tensors, header = read_tensors(source, KIND, expected, name)
    rows = _rows(tensors, len(like.weights))
    return {
        entry["id"]: Snapshot(
            {speaker: next(rows) for speaker in entry["speakers"]},
            tuple(entry["clips"]),
            named=tuple(entry.get("named", ())),  # left out if there are none
        )
        for entry in header["dialogues"]
    }


def _rows(tensors: Mapping[str, torch.Tensor], layers: int) -> Iterator[MemoryState]:
    """Row by row, copies that do not keep the whole file in memory."""
    for row in range(len(tensors["weights.0"]) if tensors else 0):
        weights, momentum = (
            tuple(tensors[f"{field}.{i}"][row : row + 1].clone() for i in range(layers))
            for field in ("weights", "momentum")
        )
        yield MemoryState(weights, momentum)


def _check_config(name: str, saved: object, ours: dict[str, Any]) -> None:
    theirs = saved if isinstance(saved, dict) else {}
    differs = [
        f"{field} is {theirs.get(field)!r} there and {ours.get(field)!r} here"
        for field in sorted(ours.keys() | theirs.keys())
        if theirs.get(field) != ours.get(field)
    ]
    if differs:
        raise CheckpointError(
            f"{name} holds states of another adapter: {'; '.join(differs[:9])}. Load it with the "
            "adapter that wrote it, after attach()."
        )


def _check_weights(name: str, saved: object, ours: str | None) -> None:
    if saved is not None and ours is not None and saved != ours:
        raise CheckpointError(
            f"{name} holds states that other weights wrote ({str(saved)[:8]} there, {ours[:8]} "
            "here), and they mean nothing to these. Load the adapter that wrote them; or, if it "
            "was trained since, forget the dialogues, which then begin anew."
        )


def _named(state: MemoryState) -> dict[str, torch.Tensor]:
    names = [f"{field}.{i}" for field in ("weights", "momentum") for i in range(len(state.weights))]
    return dict(zip(names, (*state.weights, *state.momentum), strict=True))


def _entries(name: str, entries: Any) -> list[dict[str, Any]]:
    """Checks the list of dialogues in the header of a file."""

    def is_clip(clip: Any) -> bool:
        return clip is None or (type(clip) is int and abs(clip) < 2**128)

    def is_entry(entry: Any) -> bool:
        return (
            isinstance(entry, dict)
            and isinstance(entry.get("id"), str)
            and isinstance(entry.get("speakers"), list)
            and all(speaker is None or isinstance(speaker, str) for speaker in entry["speakers"])
            and len(set(entry["speakers"])) == len(entry["speakers"])
            and isinstance(entry.get("clips"), list)
            and all(map(is_clip, entry["clips"]))
            and isinstance(entry.get("named", []), list)
            and all(type(mark) is int for mark in entry.get("named", []))
        )

    if (
        not isinstance(entries, list)
        or not all(map(is_entry, entries))
        or len({entry["id"] for entry in entries}) < len(entries)
    ):
        raise CheckpointError(
            f"the list of dialogues in {name} is not one that mal_kernels writes; it is damaged. "
            "Save it again."
        )
    return entries
