"""Numbers of speech emotion recognition, and how sure they are.

WA (weighted accuracy) is the share of right turns; UA (unweighted accuracy) the mean of the recalls
of the classes, also called balanced accuracy. Some papers swap the two names.

Turns of one dialogue depend on each other: intervals and tests draw whole dialogues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .scoring import Scored


def summary(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """WA, UA, macro-F1, weighted-F1 and ECE.

    Args:
        labels: int ``[M]``.
        probabilities: ``[M, L]``.

    Example:
        >>> summary(np.array([0, 1]), np.array([[.9, .1], [.2, .8]]))["WA"]
        1.0
    """
    from sklearn.metrics import f1_score, recall_score

    guess = probabilities.argmax(-1)
    present = np.unique(labels)  # a class that never occurs has no recall
    options: dict[str, Any] = dict(labels=present, zero_division=0)
    return {
        "WA": float((guess == labels).mean()),
        "UA": float(recall_score(labels, guess, average="macro", **options)),
        "macro-F1": float(f1_score(labels, guess, average="macro", **options)),
        "weighted-F1": float(f1_score(labels, guess, average="weighted", **options)),
        "ECE": calibration_error(labels, probabilities),
    }


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: |confidence - accuracy|, averaged over bins of confidence."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[which == b].mean() - right[which == b].mean()) * (which == b).mean()
        for b in np.unique(which)
    ]
    return float(sum(gaps))


def per_class(scored: Scored, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of turns by label."""
    from sklearn.metrics import precision_recall_fscore_support

    guess = scored.probabilities.argmax(-1)
    values = precision_recall_fscore_support(
        scored.labels, guess, labels=range(len(names)), zero_division=0
    )
    keys = ("precision", "recall", "F1", "turns")
    return {
        name: {key: float(column[i]) for key, column in zip(keys, values, strict=True)}
        for i, name in enumerate(names)
    }


def confusion(scored: Scored, classes: int) -> np.ndarray:
    """Turns by right label (rows) and answer, int ``[L, L]``."""
    from sklearn.metrics import confusion_matrix

    guess = scored.probabilities.argmax(-1)
    return confusion_matrix(scored.labels, guess, labels=range(classes))


# --- dialogue by dialogue -------------------------------------------------------------------------


class Difference(NamedTuple):
    """A paired difference of accuracy: mean, 95 % interval, and p of a two-sided test."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p = {self.p:.4f}"


def _sums(values: np.ndarray, dialogue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of ``values`` and number of turns of each dialogue that has any."""
    count = np.bincount(dialogue)
    total = np.bincount(dialogue, values.astype(float))
    return total[count > 0], count[count > 0]


def interval(
    values: np.ndarray, dialogue: np.ndarray, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over turns ``[M]``, dialogues drawn with replacement."""
    total, count = _sums(values, dialogue)
    picks = np.random.default_rng(seed).integers(len(total), size=(draws, len(total)))
    means = total[picks].sum(1) / count[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compare(
    a: np.ndarray, b: np.ndarray, dialogue: np.ndarray, draws: int = 2000, seed: int = 0
) -> Difference:
    """``a - b`` over the same turns ``[M]``.

    The interval is the bootstrap of :func:`interval`; the test swaps ``a`` and ``b`` dialogue by
    dialogue (a permutation test).

    Example:
        >>> a, b = np.ones(40), np.zeros(40)
        >>> result = compare(a, b, np.arange(40) // 2)
        >>> result.mean, result.p < 0.01
        (1.0, True)
    """
    difference = a.astype(float) - b.astype(float)
    low, high = interval(difference, dialogue, draws, seed)
    total, count = _sums(difference, dialogue)
    signs = np.random.default_rng(seed + 1).choice([-1.0, 1.0], size=(draws, len(total)))
    null = np.abs(signs @ total) / count.sum()
    mean = float(difference.mean())
    p = (1 + (null >= abs(mean) - 1e-12).sum()) / (1 + draws)
    return Difference(mean, low, high, float(p))


HISTORY = ((0, 0), (1, 1), (2, 3), (4, 6), (7, 10**9))


def by_history(right: np.ndarray, history: np.ndarray) -> dict[str, float | None]:
    """Accuracy by number of earlier turns of the same speaker; ``None`` where there are none."""
    found = {}
    for first, last in HISTORY:
        name = f"{first}" if first == last else f"{first}+" if last > 99 else f"{first}-{last}"
        where = (history >= first) & (history <= last)
        found[name] = float(right[where].mean()) if where.any() else None
    return found
