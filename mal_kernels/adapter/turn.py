"""One call of the host: read the memory at its audio tokens, collect what to write, write it once.

What is remembered does not change before the last statement of :meth:`Turn.commit`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dialogues import Dialogue, TurnReport
from ..dialogues.snapshot import EMPTY, Snapshot
from ..errors import ArgumentError, HostError
from ..hosts import Clip, Host, placed, turn_mark
from ..memory import Clips, NeuralMemory, Written, recall, write_rows
from ..state import MemoryState

log = logging.getLogger("mal_kernels")


class ClipRead(NamedTuple):
    """A clip of dialogue ``row``, new or written in an earlier turn, the last of its row or not."""

    row: int
    clip: Clip
    new: bool
    last: bool

    @property
    def length(self) -> int:
        """Tokens of the clip."""
        return self.clip.stop - self.clip.start


class Turn:
    """A turn reads and collects while the host runs, then commits.

    Args:
        memory: the module that reads and writes.
        dialogue: the dialogues of the batch; ``None``: each row is one of its own and is not kept.
        given: arguments of the call, of ``forward`` or ``generate``.
        batch: rows of the batch as the user gave it; the host may repeat each row, as for beams.
        generating: whether the call is ``generate``, which commits when it returns.
        max_state_norm: bound of a head's state; a write that would exceed it is left out.
    """

    def __init__(
        self,
        memory: NeuralMemory,
        dialogue: Dialogue | None,
        given: Mapping[str, Any],
        batch: int | None = None,
        *,
        generating: bool = False,
        max_state_norm: float | None = None,
    ) -> None:
        self.memory, self.dialogue = memory, dialogue
        self.given, self.batch, self.generating = given, batch, generating
        self.projected: list[Tensor] = []  # [..., Dm], audio that is to be found in the embeddings
        self.max_state_norm = math.inf if max_state_norm is None else max_state_norm
        # shape [R, S] of the hidden states that belong to a call with audio and are still to come
        self.expected_shape: torch.Size | None = None
        self.clip_rounds: list[list[ClipRead]] = []
        self.report = TurnReport(0, memory)

    def locate_clips(
        self, host: Host, inputs: Mapping[str, Any], mask: Tensor | None = None
    ) -> None:
        """The turn notes where the audio of a forward call is, for the next :meth:`inject`.

        Args:
            host: what is called.
            inputs: arguments of the call.
            mask: which positions ``[B, S]`` are audio, if not those of the audio token.

        Raises:
            ArgumentError: another number of dialogues than rows.
            HostError: see :meth:`Host.audio`, or rows that are not repetitions of the batch.
        """
        shape = host.shape(inputs) or torch.Size([0, 0])
        batch = self.batch or shape[0]
        if self.dialogue is not None and len(self.dialogue.ids) != batch:
            raise ArgumentError(
                f"ids has {len(self.dialogue.ids)} dialogues {list(self.dialogue.ids)}, but this "
                f"call has a batch of {batch} rows; open dialogue() with one id per row."
            )
        compared = self.dialogue is not None or shape[0] != batch
        self.repeats = max(1, shape[0] // batch)
        if host.spec.streaming and self.repeats > 1:
            raise HostError(
                "beams and num_return_sequences part the rows of a streaming host, of which each "
                "is given all that is generated; use num_beams=1 and num_return_sequences=1."
            )
        rows = host.clips(inputs, fingerprints=compared, mask=mask, key=self.memory.clip_key)
        clips = rows[:: self.repeats]
        if len(rows) != self.repeats * batch or (
            self.repeats > 1
            and not all(_same(row, clips[r // self.repeats]) for r, row in enumerate(rows))
        ):
            raise HostError(
                f"the host sees {shape[0]} rows for a batch of {batch}, and not the same audio in "
                "each copy of a row, or it cannot be told: transformers repeats audio inputs clip "
                "by clip and window by window, which mixes up several of one prompt. Use "
                "num_beams=1 and num_return_sequences=1, or one short clip per prompt."
            )
        if host.spec.streaming and self.clip_rounds:
            self._continue_clips(clips)
        else:
            self._plan_rounds(clips)
        self.expected_shape = shape

    def locate_projected(self, host: Host, embeds: Tensor, attention: Any) -> None:
        """The clips are where ``embeds`` ``[R, S, Dm]`` are what the projector returned.

        Raises:
            HostError: nowhere.
        """
        mask = placed(embeds, self.projected)
        self.projected = []
        if not mask.any():
            raise HostError(
                f"none of the embeddings that {host.spec.projector!r} returned is among those that "
                "the decoder is given; name the module after which the host does not change them "
                "any more in HostSpec(projector=...)."
            )
        self.locate_clips(host, {"inputs_embeds": embeds, "attention_mask": attention}, mask)

    def _plan_rounds(self, clips: list[list[Clip]]) -> None:
        """The turn looks up what each row remembers, which clips are new, and their order."""
        batch = len(clips)
        speakers = self.dialogue.speakers if self.dialogue else (None,) * batch
        self.past = [EMPTY] * batch
        if self.dialogue:
            self.past = [self.dialogue.store.latest(name) for name in self.dialogue.ids]
        # one memory to read per row comes first, then the shared ones that are only written
        shared = [(row, None) for row, speaker in enumerate(speakers) if speaker is not None]
        self.slots: list[tuple[int, str | None]] = [*enumerate(speakers), *shared]
        self.clip_rounds = [[]]
        self.new_fingerprints: list[tuple[int | None, ...]] = []
        self.report, self.pending = TurnReport(batch, self.memory), list[tuple[int, Tensor]]()
        self._look_up_names(batch)
        for row, clips_of_row in enumerate(clips):
            fingerprints = tuple(clip.fingerprint for clip in clips_of_row)
            known = self._known(row, fingerprints)
            retried = row in self.retried
            self.new_fingerprints.append(() if retried else fingerprints[known:])
            self.report.resent[row] = len(fingerprints) if retried else known
            for j, clip in enumerate(clips_of_row):
                # clips of earlier turns read what is remembered now, with the first new one
                turn = max(0, j - known)
                self.clip_rounds += [[] for _ in range(turn + 1 - len(self.clip_rounds))]
                self.clip_rounds[turn].append(
                    ClipRead(row, clip, j >= known, j + 1 == len(clips_of_row))
                )
        if any(self.report.resent) and self.dialogue:
            log.info(
                "%d clips were sent again and are not written to dialogues %s",
                sum(self.report.resent),
                [x for x, n in zip(self.dialogue.ids, self.report.resent, strict=True) if n],
            )

    def _look_up_names(self, batch: int) -> None:
        """The turn looks up which rows are turns that were written before, and what those read."""
        self.marks: list[int | None] = [None] * batch
        self.retried: dict[int, Snapshot | None] = {}  # None: not kept any more
        self.read = list(self.past)
        if self.dialogue is None:
            return
        rows = zip(self.dialogue.ids, self.dialogue.turn_ids, self.past, strict=True)
        for row, (dialogue, name, past) in enumerate(rows):
            mark = None if name is None else turn_mark(name, self.memory.clip_key)
            self.marks[row] = mark
            if mark is not None and mark in past.named:
                before = self.retried[row] = self.dialogue.store.before(dialogue, mark)
                self.read[row] = before or past

    def _known(self, row: int, fingerprints: tuple[int | None, ...]) -> int:
        """How many of the first clips of a row were written in earlier turns."""
        if row in self.retried and self.retried[row] is None:
            return len(fingerprints)
        if self.dialogue is not None and self.dialogue.remember_again:
            return 0
        # the last clip of a turn with a name is that turn, whatever it sounds like
        context = fingerprints if self.marks[row] is None else fingerprints[:-1]
        return self.read[row].resent(context)

    def _continue_clips(self, clips: list[list[Clip]]) -> None:
        """The next positions of the clips of a streaming host."""
        self.clip_rounds = [[ClipRead(r, clip, True, True) for r, (clip,) in enumerate(clips)]]

    def inject(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[R, S, Dm]`` with the residual at its audio tokens; the rest bit for bit.

        Each clip reads the memory as it was after the clips before it. The write of the last clip
        of each row is left to :meth:`commit`.

        Raises:
            HostError: the hidden states do not line up with ``input_ids``.
        """
        width = len(self.memory.norm)
        if not (isinstance(hidden, Tensor) and hidden.is_floating_point()) or hidden.is_meta:
            kind = f"{hidden.dtype} on {hidden.device}" if isinstance(hidden, Tensor) else hidden
            raise HostError(
                f"hidden states are {str(kind)[:80]}; pass a floating point tensor of {width} "
                "features."
            )
        if hidden.shape[:-1] == self.expected_shape and hidden.shape[-1] != width:
            raise HostError(
                f"hidden states are {list(hidden.shape)}, but the adapter is for {width} features; "
                "attach it to a host of its kind."
            )
        if hidden.shape[:-1] != self.expected_shape:
            raise HostError(
                f"hidden states are {list(hidden.shape)} for input_ids "
                f"{list(self.expected_shape or ())}: the host changed the length of the prompt. "
                "Let the processor expand it to one placeholder per audio token."
            )
        self.expected_shape = None
        self.state = self._states(hidden.device)
        original = hidden
        for clips in filter(None, self.clip_rounds):
            new = [x for x in clips if x.new]
            writes = [(x, 0, slot) for x in new if not x.last for slot in self._slots_of(x.row)]
            hidden, written = recall(
                self.memory,
                hidden,
                self._clips([(x, i, x.row) for x in clips for i in range(self.repeats)], hidden),
                self.state,
                to_write=self._clips(writes, hidden),
                max_norm=self.max_state_norm,
            )
            self.state = self._reported(written, [(slot, x.length) for x, _, slot in writes])
            heard = self._clips([(x, 0, x.row) for x in new], hidden)  # in the first copy of a row
            lengths = [x.length for x in new]
            tokens = (heard.tokens(x).split(lengths) for x in (original, hidden))
            for x, before, after in zip(new, *tokens, strict=True):
                if x.row in self.retried:
                    continue
                self.report.heard(x.row, before, after)
                if x.last:
                    self.pending.append((x.row, before))
        return hidden

    def commit(self) -> TurnReport | None:
        """Writes the last clips and puts the new states in place, for all dialogues or for none.

        Returns ``None`` if the call had no audio.

        Raises:
            HostError: the host ran without passing the site.
            StoreError: see :meth:`DialogueStore.commit`.
        """
        if self.expected_shape is not None or self.projected:
            raise HostError(
                "the host was given audio but no hidden states passed the site of the adapter. If "
                "it was compiled and called before attach(), call torch.compiler.reset() after it; "
                "else name the right decoder in HostSpec(decoder=...)."
            )
        if not self.clip_rounds:
            return None
        if self.dialogue is not None and self.pending:
            snapshots = self._snapshots(self.dialogue, self._write_last())
            past = dict(zip(self.dialogue.ids, self.past, strict=True))
            self.dialogue.store.commit(snapshots, {name: past[name] for name in snapshots})
        return self.report

    def _snapshots(self, dialogue: Dialogue, state: MemoryState) -> dict[str, Snapshot]:
        """Every dialogue of the batch after the turn, so that undo takes back one turn of each.

        Without those in which it was written before.
        """
        states = _rows(state)
        snapshots = {}
        for row, (name, past, fingerprints, mark) in enumerate(
            zip(dialogue.ids, self.past, self.new_fingerprints, self.marks, strict=True)
        ):
            if row in self.retried:
                continue
            slots = self._slots_of(row) if fingerprints else []
            # a copy, that does not keep the states of the whole batch alive
            written = {self.slots[slot][1]: states[slot].map(torch.clone) for slot in slots}
            named = past.named if mark is None or not fingerprints else (*past.named, mark)
            snapshots[name] = Snapshot(
                {**past.states, **written}, past.clips + fingerprints, named=named
            )
        return snapshots

    def _slots_of(self, row: int) -> list[int]:
        return [slot for slot, (owner, _) in enumerate(self.slots) if owner == row]

    def _states(self, device: torch.device) -> MemoryState:
        """One row per slot."""
        if self.dialogue is None:
            return self.memory.initial_state(len(self.slots)).to(device)
        keys = [(self.read[row], speaker) for row, speaker in self.slots]
        return self.dialogue.store.rows(keys, device)

    def _write_last(self) -> MemoryState:
        """The state after the last clip of each row, in every memory of that row."""
        clips: dict[int, list[Tensor]] = {}  # of a streaming host, in parts
        for row, tokens in self.pending:
            clips.setdefault(row, []).append(tokens)
        last = {row: torch.cat(parts) for row, parts in clips.items()}
        writes = [(slot, tokens) for row, tokens in last.items() for slot in self._slots_of(row)]
        slots, every = zip(*writes, strict=True)
        lengths = [len(tokens) for tokens in every]
        tokens = torch.cat(every)
        ends, rows = (torch.tensor(x, device=tokens.device) for x in ([0, *lengths], slots))
        written = write_rows(
            self.memory, tokens, ends.cumsum(0), rows, self.state, max_norm=self.max_state_norm
        )
        return self._reported(written, list(zip(slots, lengths, strict=True)))

    def _reported(self, written: Written, writes: Sequence[tuple[int, int]]) -> MemoryState:
        """The state after writes to slots, of so many tokens each, which are put on record."""
        flags = written.kept.tolist()
        kept = [write for write, ok in zip(writes, flags, strict=True) if ok]
        surprise = written.surprise.split([length for _, length in kept])
        for (slot, _), of_slot in zip(kept, surprise, strict=True):
            if slot < self.report.rows and slot not in self.retried:
                self.report.wrote(slot, of_slot)
        for (slot, _), ok in zip(writes, flags, strict=True):
            self.report.skipped_by_row[self.slots[slot][0]] += not ok
        return written.state

    def _clips(self, clips: Sequence[tuple[ClipRead, int, int]], hidden: Tensor) -> Clips:
        """Clips in one copy of their row of ``hidden`` ``[R, S, Dm]``, each with a slot."""
        table = [
            ((x.row * self.repeats + copy) * hidden.shape[1] + x.clip.start, x.length, slot)
            for x, copy, slot in clips
        ]
        columns = torch.tensor(table, dtype=torch.int64).view(-1, 3).unbind(1)
        return Clips.of(*columns).to(hidden.device)


def _same(clips: Sequence[Clip], others: Sequence[Clip]) -> bool:
    """Whether two rows are known to hold the same clips; that of one missing mark is not known."""
    return len(clips) == len(others) and all(a.same(b) for a, b in zip(clips, others, strict=True))


def _rows(state: MemoryState) -> list[MemoryState]:
    """Views of the single rows; the gradient of ``split`` is one concatenation."""
    weights, momentum = (zip(*(torch.split(t, 1) for t in f), strict=True) for f in state[:2])
    return [MemoryState(w, m) for w, m in zip(weights, momentum, strict=True)]
