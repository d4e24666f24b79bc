"""The table of ``bench/results/ser-synthetic.json``: every arm, several seeds, controls, cost.

One process runs one list of jobs and keeps what is finished, so it can be stopped, started again,
and shared between processes (``--share 0/2``, ``--share 1/2``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..demo.show import one_thread
from . import controls as c
from .evaluate import caps, figures
from .metrics import compare
from .runs import TEST, Bench, open_bench, train_run
from .scoring import Scored, score_dialogues, score_host
from .train import Settings

SIZES = {"baseline": (1000, 2000), "trap": (250, 600), "drift": (250, 600)}  # steps, dialogues
SEEDS = (0, 1, 2)
MEMORIES = ("gated-speaker", "gated", "mlp-speaker")
MAIN = (*MEMORIES, "never-written")
STEPS = {"mlp-speaker": 300}  # of a deep memory cost twice as much each
OTHERS = ("gru", "attention", "z-norm", "lora", "prompt")


class Job(NamedTuple):
    """One training: a corpus, an arm, a seed."""

    variant: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The corpus is checked by its file."""
        return f"{self.variant}-{self.arm}-{self.seed}"


def jobs(seeds: Sequence[int] = SEEDS) -> list[Job]:
    """All of the table, what matters most first."""
    order = []
    for seed in seeds:  # stopped anywhere, whole seeds are there
        order += [Job("baseline", arm, seed) for arm in MAIN]
        order += [Job("trap", arm, seed) for arm in MEMORIES]
        order.append(Job("drift", "gated-speaker", seed))
    return order + [Job("baseline", arm, seed) for seed in seeds for arm in OTHERS]


@one_thread()
def run(
    out: Path,
    cache: Path,
    todo: Sequence[Job],
    *,
    sizes: Mapping[str, tuple[int, int]] = SIZES,
    on_job: Callable[[Job, dict[str, Any]], object] = lambda job, result: None,
) -> None:
    """Runs ``todo`` and writes ``<out>/<job>.json`` for each; those that exist are left alone."""
    benches: dict[str, Bench] = {}
    out.mkdir(parents=True, exist_ok=True)
    for job in todo:
        path = out / f"{job.name}.json"
        if path.exists():
            continue
        steps, dialogues = sizes[job.variant]
        settings = Settings(
            corpus=f"synthetic:{job.variant}",
            arm=job.arm,
            seed=job.seed,
            steps=STEPS.get(job.arm, steps),
            dialogues=dialogues,
            cache=str(cache),
        )
        if job.variant not in benches:
            benches = {job.variant: open_bench(settings)}
        result = measure(settings, benches[job.variant], out / job.name)
        path.write_text(json.dumps(result))
        on_job(job, result)


def measure(settings: Settings, bench: Bench, folder: Path) -> dict[str, Any]:
    """Trains one run to its end, without choosing a checkpoint, and scores it with all controls."""
    start = time.process_time()
    model = train_run(
        settings,
        bench,
        folder,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        logging_strategy="steps",
    )
    cpu_seconds = time.process_time() - start
    dialogues = bench.encoded["test"]
    answers = {"memory": score_dialogues(model, dialogues)}
    if model.memory is not None:
        answers |= c.score_controls(model, dialogues)
    answers["host alone"] = score_host(bench.listener(), dialogues)
    state = 0
    if model.memory is not None and settings.arm != "attention":
        state = sum(t.nbytes for t in model.memory.initial(1))
    return {
        "parameters": model.trained_parameters(),
        "state_bytes": state,
        "train_cpu_seconds": round(cpu_seconds, 1),
        "steps": settings.steps,
        "finite": bool(all(torch.isfinite(p).all() for p in model.parameters())),
        "answers": {name: figures(s, dialogues) for name, s in answers.items()},
        "against memory": {
            name: compare(answers["memory"].right, s.right, s.dialogue)._asdict()
            for name, s in answers.items()
            if name != "memory"
        },
        "reset is the host": _same(answers, "reset"),
        "read off is the host": _same(answers, "read off"),
        "caps": {name: float(right.mean()) for name, right in caps(bench, settings.corpus).items()},
        "right": np.packbits(answers["memory"].right).tobytes().hex(),
    }


def _same(answers: dict[str, Scored], name: str) -> bool | None:
    """Whether a control gives the host's probabilities bit for bit."""
    if name not in answers:
        return None
    return bool((answers[name].probabilities == answers["host alone"].probabilities).all())


def collect(folder: Path) -> dict[str, Any]:
    """All finished jobs of ``folder`` as one table, means and deviations over seeds."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    seeds: dict[tuple[str, str], list[int]] = {}
    for path in sorted(folder.glob("*.json")):
        variant, rest = path.stem.split("-", 1)
        arm, seed = rest.rsplit("-", 1)
        found.setdefault((variant, arm), []).append(json.loads(path.read_text()))
        seeds.setdefault((variant, arm), []).append(int(seed))
    return {
        f"{variant}/{arm}": {"seeds": seeds[variant, arm], **_over_seeds(results)}
        for (variant, arm), results in found.items()
    }


def _over_seeds(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = results[0]
    answers = {}
    for name in first["answers"]:
        each = [result["answers"][name] for result in results]
        accuracy = [figure["WA"] for figure in each]
        answers[name] = {
            "WA": accuracy,
            "mean": float(np.mean(accuracy)),
            "sd": float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else None,
            "intervals": [figure["interval"] for figure in each],
            **{key: float(np.mean([f[key] for f in each])) for key in ("UA", "macro-F1", "ECE")},
            "by_history": {
                key: float(np.mean([f["by_history"][key] for f in each]))
                for key in each[0]["by_history"]
            },
        }
    return {
        **{key: first[key] for key in ("parameters", "state_bytes", "steps", "caps")},
        **{key: [r[key] for r in results] for key in ("train_cpu_seconds", "finite")},
        **{key: [r[key] for r in results] for key in ("reset is the host", "read off is the host")},
        "answers": answers,
        "memory against": {
            name: [result["against memory"][name] for result in results]
            for name in first["against memory"]
        },
    }


def write(path: Path, picture: Path, folder: Path) -> dict[str, Any]:
    """Collects the finished jobs of ``folder`` into ``path``, as JSON, and draws them."""
    import transformers

    import mal_kernels

    values = {
        "command": "python -m mal_kernels.ser table",
        "jobs_planned": len(jobs()),
        "protocol": {
            "host": "the demo's Qwen2-Audio, frozen, the same for every run",
            "test_dialogues": TEST,
            "sizes": {k: dict(steps=s, dialogues=d) for k, (s, d) in SIZES.items()},
            "steps of single arms": STEPS,
            "batch": Settings.batch,
            "checkpoint": "the last",
        },
        "versions": {
            "mal-kernels": mal_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "jobs_finished": len(list(folder.glob("*.json"))),
        "jobs_not_run": [j.name for j in jobs() if not (folder / f"{j.name}.json").exists()],
        "jobs": collect(folder),
    }
    path.write_text(json.dumps(values, indent=1) + "\n")
    draw(picture, values)
    return values


def draw(path: Path, values: Mapping[str, Any]) -> Path:
    """Left: accuracy by history of the main arms; right: the controls on the per-speaker memory."""
    from matplotlib.figure import Figure

    found = values["jobs"]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    colors = dict(zip(MAIN, ("#c0392b", "#d98880", "#8e44ad", "#7f8c8d"), strict=True))
    for arm, color in colors.items():
        if f"baseline/{arm}" in found:
            memory = found[f"baseline/{arm}"]["answers"]["memory"]
            history = memory["by_history"]
            seeds = len(memory["WA"])
            label = f"{arm} {memory['mean']:.3f} ({seeds} seed{'s' * (seeds > 1)})"
            left.plot(list(history), list(history.values()), "o-", color=color, label=label)
    left.set(
        xlabel="earlier turns of the same speaker", ylabel="accuracy", title="Speaker baseline"
    )
    left.legend(frameon=False)
    left.grid(axis="y", color="#dfe4e8")
    for k, (variant, color) in enumerate(
        (("baseline", "#c0392b"), ("drift", "#2c7fb8"), ("trap", "#7f8c8d"))
    ):
        if f"{variant}/gated-speaker" in found:
            answers = found[f"{variant}/gated-speaker"]["answers"]
            names = list(answers)[::-1]
            for y, name in enumerate(names):
                points = answers[name]["WA"]
                right.plot(
                    points, [y + 0.2 * (1 - k)] * len(points), "o", color=color, markersize=4
                )
            right.plot([], [], "o", color=color, label=variant)
            right.set_yticks(range(len(names)), names)
    right.set(xlabel="accuracy, one point per seed", title="The same weights, other histories")
    right.legend(frameon=False, loc="lower right")
    right.grid(axis="x", color="#dfe4e8")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    return path
