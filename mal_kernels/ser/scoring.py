"""Label log-likelihoods of whole dialogues, turn by turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .host import IGNORED, EncodedDialogue, Listener
from .memories import Arm
from .model import DialogueModel, collate

TOKENS = 60_000  # positions in one call, which bounds the memory that it takes


@dataclass(frozen=True)
class Scored:
    """The scored turns of some dialogues, M in number, in order.

    Attributes:
        labels: class of each, int ``[M]``.
        probabilities: of the L classes, float ``[M, L]``.
        dialogue: index of its dialogue, int ``[M]``.
        turn: its position in the dialogue, int ``[M]``.
        history: heard earlier turns by the same speaker, int ``[M]``.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    dialogue: np.ndarray
    turn: np.ndarray
    history: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether the most likely label is the right one, bool ``[M]``."""
        return self.probabilities.argmax(-1) == self.labels

    @property
    def likelihood_of_labels(self) -> np.ndarray:
        """Probability of the right label, ``[M]``."""
        return self.probabilities[np.arange(len(self.labels)), self.labels]


def index_turns(dialogues: Sequence[EncodedDialogue]) -> np.ndarray:
    """Where the scored turns are and what they are: int ``[M, 4]``.

    Columns: dialogue, turn, label, heard earlier turns of the same speaker.
    """
    rows = []
    for d, dialogue in enumerate(dialogues):
        seen: dict[int, int] = {}
        for t, (who, label) in enumerate(zip(dialogue.speaker, dialogue.label, strict=True)):
            if label != IGNORED:
                rows.append((d, t, label, seen.get(who, 0)))
            seen[who] = seen.get(who, 0) + dialogue.heard[t]
    return np.array(rows, int).reshape(-1, 4)


def as_scored(dialogues: Sequence[EncodedDialogue], probabilities: np.ndarray) -> Scored:
    """``probabilities`` ``[M, L]`` with what is known of their turns."""
    dialogue, turn, label, history = index_turns(dialogues).T
    return Scored(label, probabilities, dialogue, turn, history)


@torch.no_grad()
def score_dialogues(
    model: DialogueModel,
    dialogues: Sequence[EncodedDialogue],
    on_dialogue: Callable[[int], object] = lambda count: None,
) -> Scored:
    """Every scored turn of ``dialogues``, each with the memory of the turns before it.

    Args:
        model: left in the mode in which it was.
        dialogues: scored from their first turn on; several at a time.
        on_dialogue: called with the number of dialogues done.
    """
    was_training = model.training
    model.eval()
    parts = []
    for group in _groups(dialogues):
        turns = max(len(d.turns) for d in group)
        window = collate([(d, 0, len(d.turns)) for d in group], turns)
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in window.as_dict().items()}
        scores = model(**inputs)["scores"].cpu()
        parts.append(scores[window.labels != IGNORED])
        on_dialogue(len(group))
    model.train(was_training)
    probabilities = torch.cat(parts).double().softmax(-1).numpy()
    return as_scored(dialogues, probabilities)


@torch.no_grad()
def generate(
    model: DialogueModel, listener: Listener, dialogues: Sequence[EncodedDialogue]
) -> np.ndarray:
    """Lets the host write about every scored turn: classes, int ``[M]``; -1: no single label.

    Args:
        model: with the memory of the turns before.
        listener: what ``model`` was made of.
        dialogues: one after the other.
    """
    model.eval()
    tokenizer = listener.processor.tokenizer
    words = [tokenizer.decode(answer).strip().lower() for answer in listener.answers]
    longest = max(map(len, listener.answers))
    classes = []
    for dialogue in dialogues:
        window = collate([(dialogue, 0, len(dialogue.turns))], len(dialogue.turns))
        inputs = {k: v.to(model.answers.device) for k, v in window.as_dict().items()}
        scored = inputs["labels"] != IGNORED
        if not bool(scored.any()):
            continue
        where = ("embeds", "audio", "speaker", "fresh")
        embeds = model.recalled(*(inputs[name] for name in where))
        tokens = model.host.generate(
            inputs_embeds=embeds[scored],
            attention_mask=inputs["there"][scored].long(),
            max_new_tokens=longest,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        classes += [parse(text, words) for text in texts]
    return np.array(classes, int)


def parse(text: str, words: Sequence[str]) -> int:
    """Index of the one of ``words`` that is in ``text``; -1 if there is none, or several.

    Example:
        >>> [parse(text, ["sad", "happy"]) for text in ("Happy.", "sad, or happy", "sadly")]
        [1, -1, -1]
    """
    found = [
        i for i, word in enumerate(words) if re.search(rf"\b{re.escape(word)}\b", text.lower())
    ]
    return found[0] if len(found) == 1 else -1


def score_host(listener: Listener, dialogues: Sequence[EncodedDialogue]) -> Scored:
    """The host alone, one turn after the other."""
    return score_dialogues(DialogueModel(listener, Arm("host alone", "none")), dialogues)


def _groups(dialogues: Sequence[EncodedDialogue]) -> list[list[EncodedDialogue]]:
    """In order, as many at a time as fit."""
    groups: list[list[EncodedDialogue]] = [[]]
    for dialogue in dialogues:
        longest = max(len(turn.audio) for turn in dialogue.turns)
        turns = max(len(d.turns) for d in (*groups[-1], dialogue))
        if groups[-1] and turns * longest * (len(groups[-1]) + 1) > TOKENS:
            groups.append([])
        groups[-1].append(dialogue)
    return groups
