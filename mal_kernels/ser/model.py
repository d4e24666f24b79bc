"""The host with a memory beside it, over windows of dialogues: what is trained and evaluated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..hosts import find_decoder
from .host import IGNORED, EncodedDialogue, EncodedTurn, Listener
from .memories import Arm, State, TitansMemory, build_memory, lora_rank

LORA_TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Window:
    """A few turns of B dialogues, padded to K turns of S positions; what :func:`collate` makes.

    Attributes:
        embeds: ``[B, K, S, Dm]``, prompts at the right end.
        there: positions that are not padding, bool ``[B, K, S]``.
        audio: positions that are audio, bool ``[B, K, S]``; none: the turn has no sound.
        speaker: index of the speaker, int64 ``[B, K]``.
        labels: class, or -100 where there is nothing to score, int64 ``[B, K]``.
        fresh: rows that begin a dialogue here, bool ``[B]``; others go on from the last window.
    """

    embeds: Tensor
    there: Tensor
    audio: Tensor
    speaker: Tensor
    labels: Tensor
    fresh: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        """The arguments of :meth:`DialogueModel.forward`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def collate(parts: Sequence[tuple[EncodedDialogue | None, int, int]], turns: int) -> Window:
    """Turns ``start:stop`` of each dialogue, padded to ``turns``.

    Args:
        parts: ``(dialogue, start, stop)`` per row; ``None`` for a row with nothing left to say.
        turns: K.
    """
    said = [
        list(zip(d.turns, d.speaker, d.label, strict=True))[start:stop] if d else []
        for d, start, stop in parts
    ]
    some = next(row for row in said if row)[0][0]
    longest = max(len(turn.audio) for row in said for turn, _, _ in row)
    shape = (len(parts), turns)
    window = Window(
        embeds=some.embeds.new_zeros(*shape, longest, some.embeds.shape[-1]),
        there=torch.zeros(*shape, longest, dtype=torch.bool),
        audio=torch.zeros(*shape, longest, dtype=torch.bool),
        speaker=torch.zeros(shape, dtype=torch.long),
        labels=torch.full(shape, IGNORED),
        fresh=torch.tensor([start == 0 for _, start, _ in parts]),
    )
    window.there[..., -1] = True  # padding attends to something, so that nothing becomes NaN
    for b, row in enumerate(said):
        for t, (turn, speaker, label) in enumerate(row):
            _put(window, b, t, turn)
            window.speaker[b, t], window.labels[b, t] = speaker, label
    return window


def _put(window: Window, b: int, t: int, turn: EncodedTurn) -> None:
    length = len(turn.audio)
    window.embeds[b, t, -length:] = turn.embeds
    window.there[b, t, -length:] = True
    window.audio[b, t, -length:] = turn.audio


class DialogueModel(nn.Module):
    """A frozen host that answers about each turn with what a memory recalls of the earlier ones.

    The memory sits at the input embeddings, which do not depend on it: a window is first recalled
    turn by turn, then all its turns go through the decoder at once. The same as one call of the
    host per turn through the hooks of :class:`mal_kernels.MALAdapter`, which
    :func:`mal_kernels.ser.stream.play` does.

    Args:
        listener: the host.
        arm: how it uses the dialogue.
        speakers: most speakers of a dialogue.
        lora: rank of LoRA on the decoder, beside the memory; the arms ``lora`` and ``prompt`` set
            it by themselves, as large as the gated memory.
        changes: fields of :class:`MALConfig`.

    Raises:
        ArgumentError: as :class:`MALConfig`.
    """

    accepts_loss_kwargs = True  # the Trainer passes the labelled turns of the whole batch
    answers: Tensor  # [L, N], padded with IGNORED
    memory: Any  # of memories.py; None for an arm without one
    host: Any

    def __init__(
        self,
        listener: Listener,
        arm: Arm,
        *,
        speakers: int = 2,
        lora: int | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        self.arm, self.slots = arm, speakers if arm.by_speaker else 1
        decoder: Any = find_decoder(listener.model)
        width = decoder.config.hidden_size
        self.memory = build_memory(arm, width, **changes)
        if arm.kind in ("lora", "prompt"):
            like: Any = build_memory(Arm(""), width, **changes)
            lora = lora_rank(sum(p.numel() for p in like.parameters()), decoder, LORA_TARGETS)
        self.host = listener.model.requires_grad_(False)
        self.lora = lora
        if lora:
            self.host = _with_lora(listener.model, decoder, lora)
        self.carried: State | None = None  # of the rows of the last window, [B * slots, ...]
        answers = [torch.tensor(answer) for answer in listener.answers]
        padded = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED)
        self.register_buffer("answers", padded, persistent=False)

    # --- one window -------------------------------------------------------------------------------

    def forward(
        self,
        embeds: Tensor,
        there: Tensor,
        audio: Tensor,
        speaker: Tensor,
        labels: Tensor,
        fresh: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Loss, and in eval mode the scores, of a :class:`Window`.

        The state of the memories goes on from the window before where ``fresh`` is False, cut from
        its graph.

        Args:
            embeds: and those that follow: see :class:`Window`.
            there: the same.
            audio: the same.
            speaker: the same.
            labels: the same.
            fresh: the same.
            num_items_in_batch: scored turns that the loss is the mean over; by default of this
                window.

        Returns:
            ``loss``, and in eval mode ``scores``: log-likelihoods of the labels ``[B, K, L]``, NaN
            where there is nothing to score.
        """
        embeds = self.recalled(embeds, audio, speaker, fresh)
        scored = labels != IGNORED
        if not bool(scored.any()):
            scored = torch.zeros_like(scored)
            scored[:, 0] = True  # the same calls on every rank; their loss is multiplied by zero
        logp = self.answer(
            embeds, there, scored, None if not self.training else labels.clamp(min=0)
        )
        if self.training:
            weight = (labels[scored] != IGNORED).float()
            count = weight.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            return {"loss": -(logp * weight).sum() / count}
        scores = logp.new_full((*labels.shape, logp.shape[-1]), float("nan"))
        scores[scored] = logp
        scores[labels == IGNORED] = float("nan")
        gold = scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return {"loss": -gold.nanmean(), "scores": scores}

    def recalled(self, embeds: Tensor, audio: Tensor, speaker: Tensor, fresh: Tensor) -> Tensor:
        """``embeds`` with the residual of the memory at the audio of every turn."""
        if self.memory is None:
            return embeds
        heard = audio.any(-1)
        slot = speaker if self.arm.by_speaker else torch.zeros_like(speaker)
        order = sequences(slot, heard, self.slots).to(embeds.device)  # [R, C]
        tokens = gather_tokens(embeds, audio)  # [B, K, A]: positions, padded with -1
        at = tokens.flatten(0, 1)[order.clamp(min=0)]  # [R, C, A]
        mask = (at >= 0) & (order >= 0).unsqueeze(-1)
        flat = embeds.flatten(0, 2)
        x = flat[at.clamp(min=0)] * mask.unsqueeze(-1)
        changed, after = self.memory.recall(x, mask, self._state(fresh))
        self.carried = None if after is None else tuple(t.detach() for t in after)
        return flat.index_copy(0, at[mask], changed[mask].to(flat.dtype)).view_as(embeds)

    def _state(self, fresh: Tensor) -> State | None:
        """The state at the start of a window; ``None`` if nobody will go on from its end."""
        if self.carried is None and (bool(fresh.all()) and not self.keeps_state):
            return None
        initial = self.memory.initial(len(fresh) * self.slots)
        if self.carried is None:
            return initial
        rows = fresh.repeat_interleave(self.slots)
        return tuple(
            torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)
            for new, old in zip(initial, self.carried, strict=True)
        )

    keeps_state = False  # whether windows are parts of dialogues; set by the training loop
    checkpoints_activations = False

    # --- the host ---------------------------------------------------------------------------------

    def answer(
        self, embeds: Tensor, there: Tensor, scored: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Log-likelihoods of answers by the host.

        Args:
            embeds: ``[B, K, S, Dm]``, or more positions with an arm that has the dialogue in its
                prompt.
            there: bool ``[B, K, S]``.
            scored: which turns, bool ``[B, K]``, ``n`` in number.
            labels: the class to score, ``[B, K]``, or ``None`` for all.

        Returns:
            ``[n]``, or ``[n, L]`` for all classes.
        """
        if self.arm.kind == "prompt":
            first = self._answer_in_one_prompt(embeds, there)[scored]  # [n, V]
            every = first[:, self.answers[:, 0]]
            return every if labels is None else every.gather(1, labels[scored, None]).squeeze(1)
        rows, mask = embeds[scored], there[scored]
        if labels is not None:
            return self._likelihood(rows, mask, labels[scored])
        if self.answers.shape[1] == 1:
            return self._first_token(rows, mask)[:, self.answers[:, 0]]
        one = torch.ones(len(rows), dtype=torch.long, device=rows.device)
        return torch.stack(
            [self._likelihood(rows, mask, one * c) for c in range(len(self.answers))], 1
        )

    def _first_token(self, rows: Tensor, mask: Tensor) -> Tensor:
        last = torch.tensor([rows.shape[1] - 1], device=rows.device)
        return self._log_probs(rows, mask, last)[:, 0]

    def _likelihood(self, rows: Tensor, mask: Tensor, label: Tensor) -> Tensor:
        """``log p(answer of label)`` per row ``[n]``: the sum over its tokens, teacher-forced."""
        answer = self.answers[label]  # [n, N]
        known = answer != IGNORED
        given = answer[:, :-1].clamp(min=0)
        words = self.host.get_input_embeddings()(given).to(rows.dtype)
        before = torch.arange(answer.shape[1], device=rows.device) + rows.shape[1] - 1
        logp = self._log_probs(
            torch.cat([rows, words], 1), torch.cat([mask, known[:, 1:]], 1), before
        )
        chosen = logp.gather(-1, answer.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (chosen * known).sum(1)

    def _answer_in_one_prompt(self, embeds: Tensor, there: Tensor) -> Tensor:
        """Log-probabilities of the first answer token of every turn, ``[B, K, V]``.

        All turns of a dialogue are one prompt, in which each sees those before it.
        """
        if self.answers.shape[1] > 1:
            raise ArgumentError("labels need answers of one token with arm='prompt'; rename them.")
        turns, length = there.shape[1:]
        ends = torch.arange(1, turns + 1, device=there.device) * length - 1
        return self._log_probs(embeds.flatten(1, 2), there.flatten(1), ends)

    def _log_probs(self, embeds: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        """Returns the logits ``[n, P, V]`` of the tokens after the positions ``at`` ``[P]``."""
        padding = {}
        if not bool(mask.all()):  # without any, attention needs no mask and is faster
            # positions as if there were no padding: a prompt is answered the same in any batch
            position = (mask.long().cumsum(-1) - 1).clamp(min=0)
            padding = {"attention_mask": mask.long(), "position_ids": position}
        logits = self.host(
            inputs_embeds=embeds, **padding, logits_to_keep=at, use_cache=False
        ).logits
        if logits.shape[1] != len(at):  # some hosts ignore logits_to_keep
            logits = logits[:, at]
        return logits.float().log_softmax(-1)

    # --- what the Trainer asks for ----------------------------------------------------------------

    def train(self, mode: bool = True) -> DialogueModel:
        """Keeps the host in eval mode unless it checkpoints its activations."""
        super().train(mode)
        if not self.checkpoints_activations:
            self.host.eval()
        return self

    def checkpoint_activations(self) -> None:
        """The decoder recomputes its activations in the backward pass; the host's dropouts act."""
        self.checkpoints_activations = True
        new = getattr(self.host, "activation_checkpointing_enable", None)  # transformers >= 5.23
        (new or self.host.gradient_checkpointing_enable)()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns what is trained, never the frozen host."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        mine = {name for name, _ in self.named_parameters() if name.startswith("memory.")}
        full = super().state_dict(*args, **kwargs)
        return {name: value for name, value in full.items() if name in trained | mine}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads what :meth:`state_dict` returns.

        Raises:
            ArgumentError: names are missing or unknown.
        """
        wrong = set(state) ^ set(self.state_dict())
        if strict and wrong:
            raise ArgumentError(f"the checkpoint differs in {sorted(wrong)}; use its own --arm.")
        result = super().load_state_dict(state, strict=False, assign=assign)
        result.missing_keys.clear()  # the frozen host's, which are never saved
        return result

    def trained_parameters(self) -> int:
        """Numbers that training changes."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def adapter(self) -> TitansMemory:
        """The memory, if it is one of :class:`mal_kernels.MALAdapter`.

        Raises:
            ArgumentError: it is not.
        """
        if not isinstance(self.memory, TitansMemory):
            raise ArgumentError(f"arm is {self.arm.kind}, which has no MALAdapter.")
        return self.memory


def _with_lora(model: nn.Module, decoder: nn.Module, rank: int) -> nn.Module:
    """LoRA on the attention of the decoder; with a B of zero it changes nothing yet."""
    from peft import LoraConfig, get_peft_model

    path = next(name for name, module in model.named_modules() if module is decoder)
    targets = rf"{re.escape(path)}\..*\.({'|'.join(LORA_TARGETS)})"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def sequences(slot: Tensor, heard: Tensor, slots: int) -> Tensor:
    """Which turns each memory hears, in order: flat indices ``[B * slots, C]`` into ``[B, K]``.

    Padded with -1 to the longest.

    Example:
        >>> sequences(torch.tensor([[0, 1, 0]]), torch.tensor([[True, True, True]]), 2)
        tensor([[ 0,  2],
                [ 1, -1]])
    """
    turns = slot.shape[1]
    rows: list[list[int]] = [[] for _ in range(len(slot) * slots)]
    for b, (who, there) in enumerate(zip(slot.tolist(), heard.tolist(), strict=True)):
        for t in range(turns):
            if there[t]:
                rows[b * slots + who[t]].append(b * turns + t)
    longest = max(1, *map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])


def gather_tokens(embeds: Tensor, audio: Tensor) -> Tensor:
    """Flat positions in ``[B, K, S]`` of the audio of each turn, ``[B, K, A]``, padded with -1."""
    count = audio.sum(-1)  # [B, K]
    most = max(1, int(count.max()))
    index = torch.arange(audio.numel(), device=audio.device).view_as(audio)
    # audio positions first, each turn's in order
    first = audio.long().argsort(dim=-1, descending=True, stable=True)[..., :most]
    taken = index.gather(-1, first)
    there = torch.arange(most, device=audio.device) < count.unsqueeze(-1)
    return taken.where(there, torch.full_like(taken, -1))


def new_model(listener: Listener, arm: Arm, *, seed: int = 0, **options: Any) -> DialogueModel:
    """A :class:`DialogueModel` whose initial weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return DialogueModel(listener, arm, **options)
