"""One picture for each question, drawn from a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import Result, schema
from bench.cases import SWEEPS, Case
from bench.providers import (
    AUTOGRAD,
    COMPILED,
    EAGER,
    LEAN,
    LOOP,
    OURS,
    OURS_CHUNK,
    THEIRS,
    THEIRS_CHUNK,
)
from mal_kernels.demo.figure import CAP as PEER
from mal_kernels.demo.figure import HOST as PLAIN
from mal_kernels.demo.figure import INK
from mal_kernels.demo.figure import MEMORY as MAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOLID, DASHED = "-", (0, (4, 2))
STYLES: dict[str, dict[str, Any]] = {
    OURS.name: {"color": MAL, "linestyle": SOLID, "marker": "o", "linewidth": 2.4},
    OURS_CHUNK.name: {"color": MAL, "linestyle": DASHED, "marker": "o"},
    THEIRS.name: {"color": PEER, "linestyle": SOLID, "marker": "s", "linewidth": 2.4},
    THEIRS_CHUNK.name: {"color": PEER, "linestyle": DASHED, "marker": "s"},
    EAGER.name: {"color": PLAIN, "linestyle": SOLID, "marker": "^"},
    COMPILED.name: {"color": PLAIN, "linestyle": SOLID, "marker": "v"},
    LEAN.name: {"color": PLAIN, "linestyle": SOLID, "marker": "D"},
    LOOP.name: {"color": PLAIN, "linestyle": ":", "marker": "x"},
    AUTOGRAD.name: {"color": PLAIN, "linestyle": DASHED, "marker": "^"},
}
KINDS = {"forward": "forward", "forward_backward": "forward and backward"}


def _sizes(axes: Axes, every: list[int], label: str) -> None:
    """Powers of two along x, written out."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [f"{x:,}" for x in every])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _throughput(
    axes: Axes, found: Result, cases: Sequence[Case], size: str, label: str, kind: str
) -> None:
    """Tokens per second (of every head) over a size, one line per provider."""
    for name, style in STYLES.items():
        at = [c for c in cases if name in found[c.name][kind]]
        rate = [1e3 * c.batch * c.tokens / found[c.name][kind][name]["median"] for c in at]
        if at:
            sizes = [getattr(c, size) for c in at]
            axes.plot(sizes, rate, label=name, **{"markersize": 5} | style)
    axes.set_yscale("log")
    _sizes(axes, [getattr(c, size) for c in cases], label)


def _pair(figure: Figure) -> Any:
    """Two panels of throughput."""
    axes = figure.subplots(1, 2, sharey=True)
    axes[0].set_ylabel("tokens per second")
    return axes


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _two_kinds(figure: Figure, found: Result, cases: Sequence[Case], size: str, label: str) -> None:
    axes = _pair(figure)
    for place, kind in zip(axes, KINDS, strict=True):
        _throughput(place, found, cases, size, label, kind)
        place.set_title(KINDS[kind])
    _legend(axes[1])


def tokens(figure: Figure, found: Result) -> None:
    """Throughput against T."""
    figure.suptitle("Long sequences: tokens per second (B=1, H=4, D=64, E=128; higher is better)")
    _two_kinds(figure, found, SWEEPS["tokens"], "tokens", "tokens in the sequence, T")


def heads(figure: Figure, found: Result) -> None:
    """Throughput against B·H."""
    figure.suptitle("Batches: tokens per second (T=128, D=64, E=128; higher is better)")
    _two_kinds(figure, found, SWEEPS["heads"], "batch", "rows × heads, B·H")


def sizes(figure: Figure, found: Result) -> None:
    """Throughput against D and E."""
    figure.suptitle("Wider memories, forward: tokens per second (T=128, H=4; higher is better)")
    axes = _pair(figure)
    features, width = "features of a head, D (E = 2 D)", "hidden width, E (D = 64)"
    _throughput(axes[0], found, SWEEPS["features"], "head_dim", features, "forward")
    _throughput(axes[1], found, SWEEPS["width"], "hidden_dim", width, "forward")
    _legend(axes[1])


def peers(figure: Figure, found: Result) -> None:
    """Bars of the base case, fastest on top."""
    figure.suptitle("One layer, T=512, H=4, D=64, E=128: milliseconds (lower is better)")
    for axes, kind in zip(figure.subplots(1, 2), KINDS, strict=True):
        row = sorted(found["base"][kind].items(), key=lambda x: -x[1]["median"])
        names, medians = [n for n, _ in row], [q["median"] for _, q in row]
        bars = axes.barh(names, medians, color=[STYLES[n]["color"] for n in names], height=0.6)
        for bar, name in zip(bars, names, strict=True):
            bar.set_alpha(0.45 if "chunk steps" in name else 1.0)
        axes.bar_label(bars, [f"{ms:.3g}" for ms in medians], padding=3)
        axes.set(title=KINDS[kind], xscale="log", xlim=(min(medians) / 2, max(medians) * 3))
        axes.grid(False)
    figure.supxlabel("pale: chunk steps, which are less work", fontsize=9)


def memory(figure: Figure, found: Result) -> None:
    """Peak memory against T."""
    axes = figure.subplots()
    for name, row in found.items():
        peaks = {int(t): x / 1e9 for t, x in row["peak_bytes"].items()}
        label = f"{name}: {row['bytes_per_token'] / 1e3:,.0f} kB a token"
        axes.plot(list(peaks), list(peaks.values()), label=label, **STYLES[name])
        _sizes(axes, list(peaks), "tokens in the sequence, T")
    axes.set_title("Training memory: peak of the process, forward and backward (H=4, D=64, E=128)")
    axes.set(ylabel="GB, imports included", yscale="log")
    _legend(axes)


def conversation(figure: Figure, found: Result) -> None:
    """Milliseconds, bytes and tokens of a turn against the number of earlier turns."""
    figure.suptitle("The next turn of a conversation (112 audio tokens; decoder of a narrow host)")
    ways = {
        "concatenation": (PEER, "s", "all turns in the prompt"),
        "cache": (PLAIN, "^", "key-value cache"),
        "memory": (MAL, "o", "memory (MAL)"),
    }
    panels = figure.subplots(1, 3)
    for way, (color, marker, label) in ways.items():
        rows = found[way]
        look: Result = {"color": color, "marker": marker, "markersize": 5, "label": label}
        turns = [max(x["turns"], 0.5) for x in rows]
        wide = 4.0 if way == "concatenation" else 1.5  # its bytes are those of the cache
        panels[0].plot(turns, [x["ms"]["median"] for x in rows], **look)
        panels[1].plot(turns, [x["bytes"] / 1e6 for x in rows], linewidth=wide, **look)
        panels[2].plot(turns, [x["tokens"] for x in rows], **look)
    for axes, title, unit in zip(
        panels, ("time", "remembered", "tokens heard"), ("ms", "MB", "tokens"), strict=True
    ):
        axes.set(title=title, ylabel=unit, xscale="log", yscale="log", xlabel="earlier turns")
        every = [x["turns"] for x in found["memory"] if x["turns"] in (0, 1, 10, 100, 1000)]
        axes.set_xticks([max(n, 0.5) for n in every], [f"{n:,}" for n in every])
        axes.minorticks_off()
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)


def overhead(figure: Figure, found: Result) -> None:
    """Each host's call, with what the memory adds as a part of it."""
    figure.suptitle("What the memory adds to narrow hosts (112 audio tokens)")
    left, right = figure.subplots(1, 2)
    names = list(found)
    tower = [found[n]["tower"]["median"] for n in names]
    base = [found[n]["prefill"]["base"]["median"] for n in names]
    added = [found[n]["prefill"]["added"]["median"] for n in names]
    decoder = [b - t for b, t in zip(base, tower, strict=True)]
    left.bar(names, tower, color="#d5dbdf", label="audio tower")
    left.bar(names, decoder, bottom=tower, color=PLAIN, label="decoder, prefill")
    bars = left.bar(names, added, bottom=base, color=MAL, label="memory: read and write")
    shares = [found[n]["share_of_prefill"] for n in names]
    left.bar_label(bars, [f"+{100 * s:.1f} % of prefill" for s in shares], padding=3)
    left.set(title="first call of a turn", ylabel="ms", ylim=(0, 1.5 * max(base)))
    left.legend(frameon=False, loc="upper right")
    decode = [found[n]["decode"]["base"]["median"] for n in names]
    bars = right.bar(names, decode, color=PLAIN)
    shares = [found[n]["share_of_decode"] for n in names]
    right.bar_label(bars, [f"{100 * s:+.1f} % with memory" for s in shares], padding=3)
    right.set(title="each token after it", ylabel="ms", ylim=(0, 1.15 * max(decode)))


def error(figure: Figure, found: Result) -> None:
    """Relative RMS error along a stream."""
    axes = figure.subplots()
    looks: tuple[Result, ...] = (
        {"color": MAL, "marker": "o", "linewidth": 2.4},
        {"color": MAL, "marker": "o", "linestyle": DASHED},
        {"color": PLAIN, "marker": "^"},
        {"color": PEER, "marker": "s"},
    )
    for (name, errors), look in zip(found["relative_rms"].items(), looks, strict=True):
        axes.plot(found["until"][: len(errors)], errors, label=name, **look)
    _sizes(axes, found["until"], "position in the stream, tokens")
    axes.set_title("Does it drift? Output against float64, token by token")
    axes.set(ylabel="relative RMS error", yscale="log", ylim=(1e-8, 1e-1))
    axes.legend(frameon=False, loc="center right")


def state(figure: Figure, found: Result) -> None:
    """Bytes per dialogue against hidden size."""
    axes, rows = figure.subplots(), found["rows"]
    hidden = [row["hidden"] for row in rows]
    for turns, shade in ((1, 0.35), (10, 0.6), (66, 1.0)):
        sizes = [turns * row["tokens"] * row["cache_bytes"] / 1e6 for row in rows]
        label = f"key-value cache (bf16) after {turns} turn{'s' * (turns > 1)}"
        axes.scatter(hidden, sizes, color=PEER, alpha=shade, marker="s", label=label)
    flat = [row["memory_bytes"] / 1e6 for row in rows]
    wide = [row["wide_memory_bytes"] / 1e6 for row in rows]
    axes.plot(hidden, wide, color=MAL, linestyle=DASHED, marker="o", label="memory, Dm / 64 heads")
    axes.plot(hidden, flat, color=MAL, marker="o", linewidth=2.4, label="memory, 4 heads (default)")
    placed: dict[int, list[str]] = {}
    for row in rows:
        placed.setdefault(row["hidden"], []).append(row["name"])
    for x, names in placed.items():
        axes.annotate("\n".join(names), (x, 0.12), ha="center", fontsize=8, color=INK)
    axes.set(yscale="log", ylabel="MB per dialogue", xlabel="hidden size of the host, Dm")
    axes.set(ylim=(0.1, 1e4), xlim=(1700, 4500))
    axes.set_title("What is stored per dialogue (turns of 4.5 s)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


FIGURES: dict[str, Callable[[Figure, Result], None]] = {
    f.__name__: f
    for f in (peers, tokens, heads, sizes, memory, conversation, overhead, error, state)
}


SHOWN = {
    "peers": ("base",),
    "tokens": tuple(c.name for c in SWEEPS["tokens"]),
    "heads": tuple(c.name for c in SWEEPS["heads"]),
    "sizes": tuple(c.name for c in (*SWEEPS["features"], *SWEEPS["width"])),
}


def numbers(result: Result, name: str) -> Result:
    """A picture is a figure with its text for people who cannot see it.

    Raises:
        KeyError: it was not measured.
    """
    if name not in SHOWN:
        return dict(result["questions"][name])
    layers = schema.layers(result["speed"])
    return {case: layers[case] for case in SHOWN[name]}


def digest(found: Result) -> str:
    """A hash of what a picture shows; stands in the picture."""
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(result: Result, folder: Path) -> list[Path]:
    """Writes ``bench-NAME.svg`` for every picture that was measured."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 9,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "axes.grid": True,
        "grid.color": "#dfe4e8",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "mal_kernels",  # the same numbers give the same file
    }
    written = []
    for name, plot in FIGURES.items():
        try:
            found = numbers(result, name)
        except KeyError:
            continue
        with rc_context(style):
            figure = Figure(figsize=(11, 4.4), layout="constrained")
            plot(figure, found)
            path = folder / f"bench-{name}.svg"
            figure.savefig(path, metadata={"Date": None, "Identifier": digest(found)})
        written.append(path)
    return written
