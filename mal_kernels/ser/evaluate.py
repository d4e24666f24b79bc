"""Everything that is measured of a trained run, as one dict that JSON can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..demo import synth
from . import controls as c
from .corpora import synthetic
from .host import EncodedDialogue
from .metrics import (
    Difference,
    by_history,
    compare,
    confusion,
    interval,
    per_class,
    summary,
)
from .model import DialogueModel
from .runs import SYNTHETIC, Bench
from .scoring import Scored, as_scored, score_dialogues, score_host

LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """A claim, whether it is shown, and by what.

    Attributes:
        claim: in words.
        shown: whether every piece of evidence is there.
        evidence: one line each, with a tick or a cross.
    """

    claim: str
    shown: bool
    evidence: tuple[str, ...]


def figures(scored: Scored, dialogues: Sequence[EncodedDialogue]) -> dict[str, Any]:
    """Accuracy with its interval, the other metrics, and slices."""
    low, high = interval(scored.right, scored.dialogue)
    kinds = np.array([dialogues[d].dialogue.kind for d in scored.dialogue])
    slices = {kind: float(scored.right[kinds == kind].mean()) for kind in np.unique(kinds) if kind}
    return {
        "turns": len(scored.labels),
        **summary(scored.labels, scored.probabilities),
        "interval": [low, high],
        "by_history": by_history(scored.right, scored.history),
        "slices": slices,
    }


def caps(bench: Bench, corpus: str, split: str = "test") -> dict[str, np.ndarray]:
    """Right answers of the exact Bayes rules of a synthetic corpus, by name, bool ``[M]``."""
    if not corpus.startswith(SYNTHETIC):
        return {}
    variant = corpus.removeprefix(SYNTHETIC)
    said = synthetic.script(variant, split, len(bench.encoded[split]))
    rules = {
        "best from one turn (exact)": synth.single_cap(said),
        "best from the dialogue (exact)": synthetic.context_cap(said, synthetic.VARIANTS[variant]),
    }
    return {name: (guess == said.label).ravel() for name, guess in rules.items()}


def label_inertia(bench: Bench, scored: Scored, split: str = "test") -> dict[str, np.ndarray]:
    """Right answers of rules that see gold labels of the past and no sound, bool ``[M]``.

    Where there is no past, and for ``most frequent label``, the answer is that label.
    """
    dialogues = bench.encoded[split]
    other = [d for name, part in bench.encoded.items() if name != split for d in part]
    known = [label for d in (other or dialogues) for label in d.label if label >= 0]
    usual = int(np.bincount(known).argmax())
    last = c.gold_history(dialogues, scored)
    anyone = np.full(len(last), -1)
    same = scored.dialogue[1:] == scored.dialogue[:-1]
    anyone[1:][same] = scored.labels[:-1][same]
    guesses = {
        "most frequent label": np.full(len(last), usual),
        "copy the last gold label": np.where(anyone < 0, usual, anyone),
        "copy the speaker's last gold label": np.where(last < 0, usual, last),
    }
    return {name: guess == scored.labels for name, guess in guesses.items()}


@dataclass(frozen=True)
class Evaluation:
    """Answers of every kind to the same turns.

    Attributes:
        scored: by name: ``memory``, its controls, ``host alone``, ``smoothed host``, other runs.
        right: by name, for rules without probabilities: exact caps and label inertia, bool ``[M]``.
        smoothing: the weight that was best on the validation dialogues.
    """

    scored: dict[str, Scored]
    right: dict[str, np.ndarray]
    smoothing: float

    def versus(self, a: str, b: str, where: np.ndarray | None = None) -> Difference:
        """Accuracy of ``a`` minus that of ``b``, in all turns or in those ``where``."""
        first, second = (
            self.scored[name].right if name in self.scored else self.right[name] for name in (a, b)
        )
        dialogue = self.scored["memory"].dialogue
        where = np.ones(len(dialogue), bool) if where is None else where
        return compare(first[where], second[where], dialogue[where])


def evaluate(
    model: DialogueModel,
    bench: Bench,
    corpus: str,
    *,
    others: Mapping[str, DialogueModel] | None = None,
    controls: bool = True,
    on_step: Callable[[str], object] = lambda name: None,
) -> Evaluation:
    """Scores the test dialogues in every way.

    Args:
        model: the trained memory.
        bench: with splits ``validation`` and ``test``.
        corpus: its name.
        others: runs to compare with, by name; ``never-written`` is needed to show anything.
        controls: whether to run those of :data:`mal_kernels.ser.controls.CONTROLS`.
        on_step: called with the name of everything that is done.
    """
    dialogues = bench.encoded["test"]
    scored = {"memory": score_dialogues(model, dialogues)}
    on_step("memory")
    if controls and model.memory is not None:
        scored |= c.score_controls(model, dialogues, on_control=on_step)
    host = {
        name: score_host(bench.listener(), bench.encoded[name]) for name in ("test", "validation")
    }
    scored["host alone"] = host["test"]
    weight = c.best_smoothing(host["validation"], bench.encoded["validation"])
    smooth = c.smoothed(host["test"], dialogues, weight)
    scored["smoothed host"] = as_scored(dialogues, smooth)
    on_step("host alone")
    for name, other in (others or {}).items():
        scored[name] = score_dialogues(other, dialogues)
        on_step(name)
    right = caps(bench, corpus) | label_inertia(bench, scored["memory"])
    return Evaluation(scored, right, weight)


def verdicts(result: Evaluation, bench: Bench, by_speaker: bool) -> list[Verdict]:
    """Says which of the three claims the evaluation shows; what cannot be tested is not shown."""
    last = c.gold_history(bench.encoded["test"], result.scored["memory"])
    shift = (last >= 0) & (last != result.scored["memory"].labels)
    keyed = [("memory", "swapped")] if by_speaker else [("own only", "others only")]
    claims = {
        "the memory is used": [
            ("memory", "never-written", None, "above"),
            ("memory", "reset", None, "above"),
            ("wrong dialogue", "reset", None, "not above"),
        ],
        "it is keyed to the speaker": [(*pair, None, "above") for pair in keyed],
        "it is not explained by label inertia": [
            ("memory", "smoothed host", None, "above"),
            ("memory", "reset", shift, "not below"),
        ],
    }
    return [_judge(result, claim, tests) for claim, tests in claims.items()]


def _judge(result: Evaluation, claim: str, tests: Sequence[tuple[Any, ...]]) -> Verdict:
    evidence, passed = [], []
    for a, b, where, wanted in tests:
        missing = [x for x in (a, b) if x not in result.scored]
        if missing or (where is not None and not where.any()):
            evidence.append(f"? {a} against {b}: not measured")
            passed.append(False)
            continue
        d = result.versus(a, b, where)
        ok = {
            "above": d.low > 0 and d.p < LEVEL,
            "not above": not (d.low > 0 and d.p < LEVEL),
            "not below": not (d.high < 0 and d.p < LEVEL),
        }[wanted]
        at = " where the label has changed" if where is not None else ""
        evidence.append(f"{'✓' if ok else '✗'} {a} {wanted} {b}{at}: {d}")
        passed.append(ok)
    return Verdict(claim, all(passed), tuple(evidence))


def as_json(result: Evaluation, bench: Bench, by_speaker: bool) -> dict[str, Any]:
    """All figures, as they go into ``evaluation.json``."""
    dialogues, memory = bench.encoded["test"], result.scored["memory"]
    where = {"dialogue": memory.dialogue, "history": memory.history}
    return {
        "answers": {name: figures(s, dialogues) for name, s in result.scored.items()},
        "rules": {
            name: {
                "WA": float(right.mean()),
                "interval": list(interval(right, where["dialogue"])),
                "by_history": by_history(right, where["history"]),
            }
            for name, right in result.right.items()
        },
        "against memory": {
            name: result.versus("memory", name)._asdict()
            for name in result.scored
            if name != "memory"
        },
        "smoothing": result.smoothing,
        "per_class": per_class(memory, bench.corpus.labels),
        "confusion": confusion(memory, len(bench.corpus.labels)).tolist(),
        "verdicts": [vars(v) for v in verdicts(result, bench, by_speaker)],
    }
