"""The evaluation as Markdown with a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .controls import CONTROLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MEMORY, HOST, CAP, OTHER = "#22313f", "#c0392b", "#7f8c8d", "#2c7fb8", "#d9a38f"
HISTORY = ("0", "1", "2-3", "4-6", "7+")


def markdown(results: Mapping[str, Any], picture: str) -> str:
    """The report.

    Args:
        results: of :func:`mal_kernels.ser.evaluate.as_json`, with ``about`` (settings by name),
            ``corpus`` (its name) and maybe ``cost``.
        picture: where it is.
    """
    parts = [
        f"# {results['corpus']}: {results['about']['arm']}",
        f"![Accuracy by history, controls, confusion, and by class]({picture})",
        "## Verdicts",
        *_verdicts(results["verdicts"]),
        "## Answers",
        "95 % intervals draw whole dialogues. WA: accuracy; UA: mean recall of the classes. The "
        "last column is the memory minus this row, with the p of a paired permutation test.",
        _answers(results),
        "## Rules without a model",
        "Exact caps hold for synthetic corpora. Copying sees gold labels of the past and no sound: "
        "what a memory could gain by label inertia alone.",
        _rules(results["rules"]),
        "## By class",
        _classes(results["per_class"]),
    ]
    slices = results["answers"]["memory"]["slices"]
    if slices:
        rows = [[kind, f"{value:.3f}"] for kind, value in slices.items()]
        parts += ["## By kind of dialogue", _table(["kind", "accuracy with memory"], rows)]
    if "cost" in results:
        parts += ["## Cost", _cost(results["cost"])]
    parts += ["## Settings", "```json", _json(results["about"]), "```"]
    return "\n\n".join(parts) + "\n"


def _json(values: Mapping[str, Any]) -> str:
    import json

    return json.dumps(values, indent=2)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for v in verdicts:
        shown = "**shown**" if v["shown"] else "**not shown**"
        evidence = "".join(f"\n  * {line}" for line in v["evidence"])
        lines.append(f"* {v['claim'].capitalize()}: {shown}{evidence}")
    return lines


def _answers(results: Mapping[str, Any]) -> str:
    rows = []
    for name, f in results["answers"].items():
        low, high = f["interval"]
        d = results["against memory"].get(name)
        gain = "" if d is None else f"{d['mean']:+.3f}, p {d['p']:.4f}"
        about = f" ({CONTROLS[name].about})" if name in CONTROLS else ""
        values = [f"{f[key]:.3f}" for key in ("UA", "macro-F1", "weighted-F1", "ECE")]
        accuracy = f"{f['WA']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append([name + about, accuracy, *values, *_history(f["by_history"]), gain])
    head = ["", "WA", "UA", "macro-F1", "weighted-F1", "ECE", *_history_heads(), "memory gains"]
    return _table(head, rows)


def _history(values: Mapping[str, float | None]) -> list[str]:
    return ["–" if values[key] is None else f"{values[key]:.2f}" for key in HISTORY]


def _history_heads() -> list[str]:
    return [f"{HISTORY[0]} earlier", *HISTORY[1:]]


def _rules(rules: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            f"{r['WA']:.3f} [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]",
            *_history(r["by_history"]),
        ]
        for name, r in rules.items()
    ]
    return _table(["rule", "WA", *_history_heads()], rows)


def _classes(classes: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [name, *(f"{v[key]:.3f}" for key in ("precision", "recall", "F1")), f"{v['turns']:.0f}"]
        for name, v in classes.items()
    ]
    return _table(["label", "precision", "recall", "F1", "turns"], rows)


def _cost(cost: Mapping[str, Any]) -> str:
    return (
        f"Median of {cost['turns']} turns on {cost['device']}, one dialogue at a time: host "
        f"{cost['host_ms']:.1f} ms without its encoder, memory {cost['memory_ms']:+.1f} ms. State: "
        f"{cost['state_bytes_per_speaker'] / 1024:.1f} KiB a speaker. Peak memory: "
        f"{cost['peak_bytes'] / 2**20:.0f} MiB."
    )


# --- the picture ----------------------------------------------------------------------------------


def draw(path: Path, results: Mapping[str, Any]) -> Path:
    """Four panels: accuracy by history, controls, confusion, by class; as PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.edgecolor": INK, "text.color": INK}):
        figure = Figure(figsize=(11, 8), layout="constrained")
        (a, b), (c, d) = figure.subplots(2, 2)
        _draw_history(a, results)
        _draw_controls(b, results)
        _draw_confusion(c, results)
        _draw_classes(d, results)
        for axes in (a, b, d):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=140)
    return path


def _draw_history(axes: Axes, results: Mapping[str, Any]) -> None:
    looks: dict[str, dict[str, Any]] = {
        "memory": dict(color=MEMORY, marker="o", linewidth=2.5),
        "host alone": dict(color=HOST, marker="o"),
        "never-written": dict(color=OTHER, marker="s"),
        "best from the dialogue (exact)": dict(color=CAP, linestyle="--"),
        "best from one turn (exact)": dict(color=CAP, linestyle=":"),
    }
    for name, look in looks.items():
        found = results["answers"].get(name) or results["rules"].get(name)
        if found is not None:
            values = [found["by_history"][key] for key in HISTORY]
            axes.plot(HISTORY, [np.nan if v is None else v for v in values], label=name, **look)
    axes.set(xlabel="earlier turns of the same speaker", ylabel="accuracy", title="By history")
    axes.grid(axis="y", color="#dfe4e8")
    axes.legend(frameon=False)


def _draw_controls(axes: Axes, results: Mapping[str, Any]) -> None:
    answers = results["answers"]
    names = list(answers)[::-1]
    for y, name in enumerate(names):
        low, high = answers[name]["interval"]
        color = MEMORY if name == "memory" else OTHER if name in CONTROLS else HOST
        axes.plot([low, high], [y, y], color=color, linewidth=2)
        axes.plot(answers[name]["WA"], y, "o", color=color)
    axes.axvline(answers["host alone"]["WA"], color=HOST, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="accuracy, 95 % interval over dialogues", title="Memory, controls, comparisons")
    axes.grid(axis="x", color="#dfe4e8")


def _draw_confusion(axes: Axes, results: Mapping[str, Any]) -> None:
    counts = np.array(results["confusion"], float)
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    names = list(results["per_class"])
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(share):
        for j, value in enumerate(row):
            color = "white" if value > 0.6 else INK
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="answer", ylabel="right label", title="Confusion with memory")


def _draw_classes(axes: Axes, results: Mapping[str, Any]) -> None:
    names = list(results["per_class"])
    at = np.arange(len(names))
    for k, (key, color) in enumerate((("precision", OTHER), ("recall", CAP), ("F1", MEMORY))):
        values = [results["per_class"][name][key] for name in names]
        axes.bar(at + 0.27 * (k - 1), values, 0.25, label=key, color=color)
    axes.set_xticks(at, names, rotation=30 if len(names) > 4 else 0)
    axes.set(ylim=(0, 1), title="By class, with memory")
    axes.legend(frameon=False, ncols=3)
