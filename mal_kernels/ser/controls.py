"""Controls ask what a trained memory answers when the history it hears is not the true one.

A control is a rule that gives, for each scored turn, the list of earlier turns that the memory
hears before it. The truth is one such rule; all others are experiments on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .host import EncodedDialogue, EncodedTurn
from .model import DialogueModel, collate
from .scoring import Scored, as_scored, index_turns

Reference = tuple[int, int]  # dialogue, turn
BATCH_FLOATS = 2**26  # numbers in the audio tokens of one batch of histories
NOISE_TURNS = 256
STOP_AFTER = 4  # turns of the dialogue


@dataclass(frozen=True)
class Target:
    """A turn to answer, and what a control may draw on.

    Attributes:
        dialogues: all of them; the last is noise.
        dialogue: index of the dialogue.
        turn: position in it.
        partner: another dialogue, about as long and with as many speakers.
        by_speaker: whether the memory hears only turns of one speaker.
        rng: the control's own randomness.
    """

    dialogues: Sequence[EncodedDialogue]
    dialogue: int
    turn: int
    partner: int
    by_speaker: bool
    rng: np.random.Generator

    @property
    def speaker(self) -> int:
        """Who speaks."""
        return self.dialogues[self.dialogue].speaker[self.turn]

    def earlier(self, wanted: Callable[[int], bool] = lambda speaker: True) -> list[Reference]:
        """Heard turns before this one whose speaker is ``wanted``."""
        here = self.dialogues[self.dialogue]
        return [
            (self.dialogue, t)
            for t in range(self.turn)
            if here.heard[t] and wanted(here.speaker[t])
        ]

    def truth(self) -> list[Reference]:
        """The memory hears the true history."""
        return self.earlier(lambda who: who == self.speaker or not self.by_speaker)


def _no_write_after(target: Target) -> list[Reference]:
    return [(d, t) for d, t in target.truth() if t < STOP_AFTER]


def _wrong_dialogue(target: Target) -> list[Reference]:
    """The memory hears as many turns of another dialogue; of one speaker, if it has one."""
    other = target.dialogues[target.partner]
    speaker = target.speaker % (max(other.speaker) + 1)
    turns = [
        (target.partner, t)
        for t, who in enumerate(other.speaker)
        if other.heard[t] and (who == speaker or not target.by_speaker)
    ]
    return turns[: len(target.truth())]


def _noise(target: Target) -> list[Reference]:
    noise = len(target.dialogues) - 1
    turns = len(target.dialogues[noise].turns)
    return [(noise, int(t)) for t in target.rng.integers(turns, size=len(target.truth()))]


def _shuffled(target: Target) -> list[Reference]:
    truth = target.truth()
    return [truth[i] for i in target.rng.permutation(len(truth))]


def _swapped(target: Target) -> list[Reference]:
    """The memory of the next speaker of the dialogue."""
    speakers = max(target.dialogues[target.dialogue].speaker) + 1
    return target.earlier(lambda who: who == (target.speaker + 1) % speakers)


@dataclass(frozen=True)
class Control:
    """One experiment.

    Attributes:
        about: one line for tables.
        history: its rule.
        applies: to memories ``by_speaker``, to ``shared`` ones, or to ``both``.
    """

    about: str
    history: Callable[[Target], list[Reference]]
    applies: str = "both"


CONTROLS = {
    "reset": Control("forgets before every turn", lambda target: []),
    "no write": Control(f"hears the first {STOP_AFTER} turns only", _no_write_after),
    "wrong dialogue": Control("hears another dialogue", _wrong_dialogue),
    "noise": Control("hears noise of the same moments", _noise),
    "shuffled": Control("hears the history in random order", _shuffled),
    "reversed": Control("hears it backwards", lambda target: target.truth()[::-1]),
    "swapped": Control("reads another speaker's memory", _swapped, "by_speaker"),
    "merged": Control("hears all speakers", lambda target: target.earlier(), "by_speaker"),
    "own only": Control(
        "hears this speaker only",
        lambda target: target.earlier(lambda who: who == target.speaker),
        "shared",
    ),
    "others only": Control(
        "hears the others only",
        lambda target: target.earlier(lambda who: who != target.speaker),
        "shared",
    ),
}


def partners(dialogues: Sequence[EncodedDialogue]) -> list[int]:
    """For each dialogue another one: its neighbour in order of speakers, then length.

    Example:
        >>> partners([])
        []
    """
    order = sorted(
        range(len(dialogues)), key=lambda d: (max(dialogues[d].speaker), len(dialogues[d].turns))
    )
    other = [0] * len(order)
    for here, there in zip(order, [*order[1:], *order[:1]], strict=True):
        other[here] = there
    return other


def noise_dialogue(dialogues: Sequence[EncodedDialogue], seed: int = 0) -> EncodedDialogue:
    """Turns as long as real ones, of Gaussian audio tokens of the same mean and deviation."""
    heard = [turn for d in dialogues for turn in d.turns if bool(turn.audio.any())]
    draw = torch.Generator().manual_seed(seed)
    some = [heard[i] for i in torch.randint(len(heard), (NOISE_TURNS,), generator=draw)]
    tokens = torch.cat([turn.embeds[turn.audio] for turn in some]).float()
    mean, deviation = tokens.mean(0), tokens.std(0)
    turns = []
    for turn in some:
        embeds = turn.embeds.clone()
        count = int(turn.audio.sum())
        noise = mean + deviation * torch.randn(count, len(mean), generator=draw)
        embeds[turn.audio] = noise.to(embeds.dtype)
        turns.append(EncodedTurn(embeds, turn.audio))
    silent = (0,) * len(turns)
    return EncodedDialogue(dialogues[0].dialogue, tuple(turns), silent, silent)


def score_controls(
    model: DialogueModel,
    dialogues: Sequence[EncodedDialogue],
    names: Sequence[str] | None = None,
    *,
    seed: int = 0,
    on_control: Callable[[str], object] = lambda name: None,
) -> dict[str, Scored]:
    """Scores of every control that applies, and of ``read off``: the host, with its LoRA if any.

    Args:
        model: with a memory.
        dialogues: whose scored turns are answered.
        names: of :data:`CONTROLS`; all that apply if ``None``.
        seed: of the random ones.
        on_control: called with each name when it is done.
    """
    kind = "by_speaker" if model.arm.by_speaker else "shared"
    usable = [n for n, control in CONTROLS.items() if control.applies in (kind, "both")]
    where = index_turns(dialogues)
    found = {"read off": as_scored(dialogues, score_histories(model, dialogues, where, None))}
    everything = [*dialogues, noise_dialogue(dialogues, seed)]
    other = partners(dialogues)
    for name in usable if names is None else names:
        rng = np.random.default_rng([seed, list(CONTROLS).index(name)])
        histories = [
            CONTROLS[name].history(Target(everything, d, t, other[d], kind == "by_speaker", rng))
            for d, t in where[:, :2].tolist()
        ]
        found[name] = as_scored(dialogues, score_histories(model, everything, where, histories))
        on_control(name)
    return found


@torch.no_grad()
def score_histories(
    model: DialogueModel,
    dialogues: Sequence[EncodedDialogue],
    where: np.ndarray,
    histories: Sequence[Sequence[Reference]] | None,
) -> np.ndarray:
    """Probabilities ``[M, L]`` of turns, each after a history of its own.

    Args:
        model: with a memory.
        dialogues: what the references point into.
        where: dialogue and turn of what is answered, int ``[M, >= 2]``.
        histories: what the memory hears before each; ``None``: the memory is not read at all.
    """
    model.eval()
    lengths = np.zeros(len(where), int) if histories is None else np.array([*map(len, histories)])
    order = np.argsort(lengths, kind="stable")
    rows: dict[int, torch.Tensor] = {}
    longest = max(len(turn.audio) for d in dialogues for turn in d.turns)
    start = 0
    width = dialogues[0].turns[0].embeds.shape[-1]
    while start < len(order):
        most = 1 + int(lengths[order[min(start + 512, len(order)) - 1]])
        size = max(1, min(512, BATCH_FLOATS // (most * longest * width)))
        batch = order[start : start + size]
        parts = [(dialogues[d], t, t + 1) for d, t in where[batch, :2].tolist()]
        heard = None if histories is None else [histories[i] for i in batch]
        scores = _score_batch(model, dialogues, parts, heard)
        rows |= dict(zip(batch.tolist(), scores, strict=True))
        start += size
    return torch.stack([rows[i] for i in range(len(where))]).double().softmax(-1).numpy()


def _score_batch(
    model: DialogueModel,
    dialogues: Sequence[EncodedDialogue],
    parts: Sequence[tuple[EncodedDialogue, int, int]],
    histories: Sequence[Sequence[Reference]] | None,
) -> torch.Tensor:
    device = next(model.parameters()).device
    window = {k: v.to(device) for k, v in collate(parts, turns=1).as_dict().items()}
    embeds, audio = window["embeds"], window["audio"]
    if histories is not None:
        said = [
            [*(dialogues[d].turns[t] for d, t in history), dialogue.turns[turn]]
            for history, (dialogue, turn, _) in zip(histories, parts, strict=True)
        ]
        x, mask = _tokens(said)
        changed, _ = model.memory.recall(x.to(device), mask.to(device))
        row = torch.arange(len(said))
        last = torch.tensor([len(turns) - 1 for turns in said])
        embeds = embeds.clone()
        embeds[audio] = changed[row, last][mask[row, last]].to(embeds.dtype)
    scored = torch.ones(len(parts), 1, dtype=torch.bool, device=device)
    return model.answer(embeds, window["there"], scored, None).cpu()


def _tokens(said: Sequence[Sequence[EncodedTurn]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio tokens of sequences of turns ``[R, C, A, Dm]``, and which exist ``[R, C, A]``."""
    turns = max(map(len, said))
    tokens = max(int(turn.audio.sum()) for row in said for turn in row)
    some = said[0][0].embeds
    x = some.new_zeros(len(said), turns, tokens, some.shape[-1])
    mask = torch.zeros(x.shape[:-1], dtype=torch.bool)
    for r, row in enumerate(said):
        for c, turn in enumerate(row):
            count = int(turn.audio.sum())
            x[r, c, :count] = turn.embeds[turn.audio]
            mask[r, c, :count] = True
    return x, mask


# --- what needs no training -----------------------------------------------------------------------


def smoothed(scored: Scored, dialogues: Sequence[EncodedDialogue], weight: float) -> np.ndarray:
    """A running mean of each speaker's posteriors, ``[M, L]``: all that inertia of labels can give.

    Args:
        scored: answers of a model without memory.
        dialogues: of which ``scored`` is the result.
        weight: of the past, in [0, 1).
    """
    past: dict[tuple[int, int], np.ndarray] = {}
    rows = []
    for p, d, t in zip(scored.probabilities, scored.dialogue, scored.turn, strict=True):
        key = (int(d), dialogues[d].speaker[t])
        past[key] = weight * past[key] + (1 - weight) * p if key in past else p
        rows.append(past[key])
    return np.array(rows)


WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)


def best_smoothing(scored: Scored, dialogues: Sequence[EncodedDialogue]) -> float:
    """The weight of :data:`WEIGHTS` with the most right answers; for validation dialogues."""
    return max(
        WEIGHTS,
        key=lambda w: (smoothed(scored, dialogues, w).argmax(-1) == scored.labels).mean(),
    )


def gold_history(dialogues: Sequence[EncodedDialogue], scored: Scored) -> np.ndarray:
    """The right label of the same speaker's last scored turn, -1 if there is none; ``[M]``."""
    last: dict[tuple[int, int], int] = {}
    found = []
    for label, d, t in zip(scored.labels, scored.dialogue, scored.turn, strict=True):
        key = (int(d), dialogues[d].speaker[t])
        found.append(last.get(key, -1))
        last[key] = int(label)
    return np.array(found)
