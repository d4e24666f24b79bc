"""The demo's picture: accuracy by length of history, and surprise over turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mal_kernels.demo.play import Evaluation, Score

INK, MEMORY, HOST, CAP, CHANCE = "#22313f", "#c0392b", "#7f8c8d", "#2c7fb8", "#95a5a6"
STYLES: dict[str, dict[str, Any]] = {
    "memory": {"color": MEMORY, "marker": "o", "linewidth": 2.5, "markersize": 6},
    "no memory": {"color": HOST, "marker": "o", "linewidth": 2.0, "markersize": 5},
    "context cap": {"color": CAP, "linestyle": "--", "linewidth": 1.5},
    "single-utterance cap": {"color": CAP, "linestyle": ":", "linewidth": 1.5},
}
LABEL_SHIFT = {"no memory": -14, "single-utterance cap": 14}  # points; these two curves meet


def draw(path: Path, result: Evaluation) -> Path:
    """Write the figure as PNG to ``path`` and return it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: draws without a display or a window

    style = {"font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK}
    with rc_context(style):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        _accuracy(left, result.scores)
        _surprise(right, result.surprise)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dfe4e8", linewidth=0.8)
            axes.set_axisbelow(True)
        figure.savefig(path, dpi=150)
    return path


def _accuracy(axes: Axes, scores: dict[str, Score]) -> None:
    for name, look in STYLES.items():
        curve = np.array(scores[name].curve)
        axes.plot(curve, **look)
        last = np.flatnonzero(np.isfinite(curve))[-1]
        axes.annotate(
            f"{name}\n{scores[name].accuracy:.3f} over all turns",
            (last, curve[last]),
            xytext=(10, LABEL_SHIFT.get(name, 0)),
            textcoords="offset points",
            va="center",
            color=look["color"],
            fontsize=9,
            annotation_clip=False,
        )
    axes.axhline(1 / 3, color=CHANCE, linewidth=1)
    axes.text(0, 1 / 3, "chance", va="bottom", color=CHANCE, fontsize=9)
    axes.set(
        title="One frozen model, with and without memory",
        xlabel="earlier turns by the same speaker",
        ylabel="accuracy",
        ylim=(0.3, 1.0),
    )


def _surprise(axes: Axes, surprise: np.ndarray) -> None:
    turns = np.arange(1, surprise.shape[1] + 1)
    low, middle, high = np.nanpercentile(surprise, (25, 50, 75), axis=0)
    axes.fill_between(turns, low, high, color=MEMORY, alpha=0.15, linewidth=0, label="middle half")
    axes.plot(turns, middle, color=MEMORY, marker="o", linewidth=2, label="median dialogue")
    axes.set(title="Surprise over the dialogue", xlabel="turn", xticks=turns[::3])
    axes.set_ylabel("surprise  ‖M(k) − v‖²")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower left")
