"""``python -m mal_kernels.ser``: check, prepare, train, evaluate, demo, table."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..console import errors_without_traceback

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes one speaks
CORPUS = "synthetic:baseline, :inertia, :drift or :trap; iemocap, iemocap6, meld, multidialog, m3ed"
CorpusName = Annotated[str, typer.Option(help=CORPUS)]
Root = Annotated[Path | None, typer.Option(help="Directory of the corpus.")]
Cache = Annotated[Path | None, typer.Option(help="Keeps the encoded turns.")]
SHOWN_NOTES = 20


@contextmanager
def _bars() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        yield bars


@app.command()
def check(corpus: CorpusName, root: Root = None) -> None:
    """Count what a directory holds, against the complete corpus; exit code 1 if they differ."""
    from .runs import open_corpus

    with errors_without_traceback():
        found = open_corpus(corpus, root)
    wrong, counts = found.check(), found.counts()
    table = Table("", "found", "complete", title=found.name, title_justify="left")
    for name in [*counts, *(n for n in found.expected if n not in counts)]:
        should = str(found.expected.get(name, ""))
        style = "red" if name in wrong else "green" if should else None
        table.add_row(name, str(counts.get(name, 0)), should, style=style)
    console.print(table)
    for note in found.notes[:SHOWN_NOTES]:
        console.print(f"[dim]{escape(note)}[/dim]", soft_wrap=True)
    if len(found.notes) > SHOWN_NOTES:
        console.print(f"[dim]... and {len(found.notes) - SHOWN_NOTES} notes more[/dim]")
    if wrong:
        raise typer.Exit(1)
    console.print("Complete." if found.expected else "Nothing is known about its full size.")


@app.command()
def arms() -> None:
    """Show the ways to use a dialogue that ``train --arm`` knows."""
    from .memories import ARMS

    table = Table("arm", "what it is")
    for name, about in ARMS.items():
        table.add_row(name, about.about)
    console.print(table)


@app.command()
def prepare(
    corpus: CorpusName,
    root: Root = None,
    host: Annotated[str, typer.Option(help="'demo', or a model id.")] = "demo",
    cache: Cache = Path("ser-cache"),
    workers: Annotated[int, typer.Option(min=1, help="ffmpeg processes.")] = 4,
) -> None:
    """Extract MELD's sound, and encode every turn with the host; can be stopped and run again."""
    from .corpora import meld
    from .runs import open_bench, open_corpus
    from .train import Settings

    with errors_without_traceback(), _bars() as bars:
        if corpus == "meld" and root is not None:
            clips = sum(len(meld.clips(root, split)) for split in meld.SPLITS)
            task = bars.add_task("Extracting sound", total=clips)
            failed = meld.prepare(
                root, root / "wav", workers=workers, on_clip=lambda: bars.advance(task)
            )
            for line in failed:
                console.print(f"[red]{escape(line)}[/red]")
        where = None if root is None else str(root)
        settings = Settings(corpus=corpus, root=where, host=host, cache=str(cache))
        splits = sorted({d.split for d in open_corpus(corpus, root, fold=settings.fold).dialogues})
        open_bench(settings, splits, **_encoding(bars))


def _encoding(bars: Progress) -> dict[str, Any]:
    task = bars.add_task("Encoding turns", total=None)
    return dict(
        on_turn=lambda turns: bars.advance(task, turns),
        on_total=lambda total: bars.update(task, total=total),
    )


def _follow(bars: Progress, title: str, steps: int) -> Any:
    """A callback of the Trainer that moves a bar."""
    from transformers import TrainerCallback

    class Follow(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.task = bars.add_task(title, total=steps, completed=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bars.update(self.task, completed=state.global_step)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if logs and "eval_accuracy" in logs:
                text = f"{title} · validation {logs['eval_accuracy']:.3f}"
                bars.update(self.task, description=text)

    return Follow()


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    corpus: CorpusName = "synthetic:baseline",
    root: Root = None,
    arm: Annotated[str, typer.Option(help="How the dialogue is used; see `arms`.")] = (
        "gated-speaker"
    ),
    host: Annotated[str, typer.Option(help="'demo', or a model id.")] = "demo",
    fold: Annotated[int, typer.Option(help="Session of IEMOCAP to hold out.")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Dialogues per step and process.")] = 32,
    accumulation: Annotated[int, typer.Option(min=1, help="Steps per update.")] = 1,
    window: Annotated[
        int | None, typer.Option(min=1, help="Turns to backpropagate through; all if left out.")
    ] = None,
    lr: Annotated[float, typer.Option(min=0.0)] = 2e-2,
    warmup: Annotated[int, typer.Option(min=0)] = 30,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head of the memory.")] = 16,
    lora: Annotated[int | None, typer.Option(min=1, help="Rank of LoRA on the decoder.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute the decoder's activations.")
    ] = False,
    dialogues: Annotated[int, typer.Option(min=1, help="Synthetic training dialogues.")] = 2000,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 100,
    cache: Cache = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = (
        False
    ),
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log for it, too.")] = False,
) -> None:
    """Train one arm on one corpus; also under ``accelerate launch`` or ``torchrun``."""
    from .runs import open_bench, train_run
    from .train import Settings

    given = {
        k: v for k, v in locals().items() if k in {f.name for f in dataclasses.fields(Settings)}
    }
    given |= {"root": root and str(root), "cache": cache and str(cache)}
    settings = Settings(**given)
    with errors_without_traceback(), _bars() as bars:
        bench = open_bench(settings, ("train", "validation"), **_encoding(bars))
        follow = _follow(bars, f"Training {arm}", steps)
        changes = {"report_to": "tensorboard"} if tensorboard else {}
        train_run(settings, bench, out, resume=resume, callbacks=[follow], **changes)
    console.print(f"Run: [b]{escape(str(out))}[/b]")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="Other runs on the same corpus; one never-written.")
    ] = None,
    controls: Annotated[bool, typer.Option(help="False histories, and what they change.")] = True,
    generation: Annotated[
        bool, typer.Option("--generate", help="Let the host write its answers, too.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Of the report; the run if left out.")] = None,
    cache: Cache = None,
) -> None:
    """Score a run on the test dialogues, run the controls, and write a report."""
    from .runs import load_run, open_bench
    from .train import Settings

    with errors_without_traceback(), _bars() as bars:
        settings = Settings.load(run)
        if cache is not None:
            settings = dataclasses.replace(settings, cache=str(cache))
        bench = open_bench(settings, ("validation", "test"), **_encoding(bars))
        others = {Settings.load(p).arm: load_run(p, bench) for p in against or ()}
        model = load_run(run, bench)
        values = _report(bars, settings, bench, model, others, controls, out or run)
        if generation:
            _generate(model, bench, values, out or run)


def _report(
    bars: Progress,
    settings: Any,
    bench: Any,
    model: Any,
    others: dict[str, Any],
    controls: bool,
    out: Path,
) -> dict[str, Any]:
    from . import report
    from .cost import cost
    from .evaluate import as_json
    from .evaluate import evaluate as score
    from .memories import TitansMemory

    task = bars.add_task("Scoring", total=None)
    result = score(
        model,
        bench,
        settings.corpus,
        others=others,
        controls=controls,
        on_step=lambda name: bars.update(task, description=f"Scored {name}"),
    )
    values = as_json(result, bench, model.arm.by_speaker)
    values |= {"about": dataclasses.asdict(settings), "corpus": bench.corpus.name}
    if isinstance(model.memory, TitansMemory):
        values["cost"] = cost(model, bench.encoded["test"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(values, indent=1) + "\n")
    report.draw(out / "report.png", values)
    (out / "report.md").write_text(report.markdown(values, "report.png"))
    bars.stop()
    _show(values)
    console.print(f"Report: [b]{escape(str(out / 'report.md'))}[/b], report.png, evaluation.json")
    return values


def _generate(model: Any, bench: Any, values: dict[str, Any], out: Path) -> None:
    """Adds accuracy and parse failures of written answers to ``evaluation.json``."""
    from .scoring import generate, index_turns

    dialogues = bench.encoded["test"]
    classes, labels = generate(model, bench.listener(), dialogues), index_turns(dialogues)[:, 2]
    failures = int((classes < 0).sum())
    values["generation"] = {"WA": float((classes == labels).mean()), "parse_failures": failures}
    (out / "evaluation.json").write_text(json.dumps(values, indent=1) + "\n")
    console.print(
        f"Written answers: accuracy {values['generation']['WA']:.3f}, {failures} of {len(labels)} "
        "not one label."
    )


def _show(values: dict[str, Any]) -> None:
    table = Table("", "accuracy", "95 %", "0", "1", "2-3", "4-6", "7+", title=values["corpus"])
    for name, f in {**values["answers"], **values["rules"]}.items():
        low, high = f["interval"]
        history = ["" if v is None else f"{v:.2f}" for v in f["by_history"].values()]
        style = "bold" if name == "memory" else None
        table.add_row(name, f"{f['WA']:.3f}", f"{low:.3f}-{high:.3f}", *history, style=style)
    console.print(table)
    for v in values["verdicts"]:
        color = "green" if v["shown"] else "yellow"
        console.print(f"[{color}]{'shown' if v['shown'] else 'not shown'}[/]: {v['claim']}")
        for line in v["evidence"]:
            console.print(f"  {line}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of runs and report.")] = Path("ser-demo"),
    arm: Annotated[str, typer.Option(help="The memory.")] = "gated-speaker",
    steps: Annotated[int, typer.Option(min=1)] = 250,
    dialogues: Annotated[int, typer.Option(min=2, help="To train on.")] = 600,
    test: Annotated[int, typer.Option(min=2, help="To test on.")] = 150,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Synthetic dialogues, a memory and its never-written twin, controls and a report."""
    from ..demo.show import one_thread
    from .runs import for_arm, open_bench, train_run
    from .train import Settings

    settings = Settings(arm=arm, steps=steps, dialogues=dialogues, seed=seed)
    with errors_without_traceback(), one_thread(), _bars() as bars:
        bench = open_bench(settings, test=test, **_encoding(bars))
        models = {}
        for name in (arm, "never-written"):
            follow = _follow(bars, f"Training {name}", steps)
            models[name] = train_run(
                for_arm(settings, name), bench, out / name, callbacks=[follow]
            ).eval()
        memory = models.pop(arm)
        _report(bars, settings, bench, memory, models, True, out)


@app.command()
def table(
    out: Annotated[Path, typer.Option(help="Folder of the jobs.")] = Path("ser-table"),
    cache: Cache = Path("ser-cache"),
    share: Annotated[str, typer.Option(help="Every n-th job from the i-th: i/n.")] = "0/1",
    result: Annotated[Path, typer.Option(help="The table, as JSON.")] = Path("ser-synthetic.json"),
    picture: Annotated[Path, typer.Option(help="Its figure.")] = Path("ser-synthetic.png"),
) -> None:
    """Train and control every arm with three seeds, and collect the table; can be stopped."""
    from . import benchmark

    with errors_without_traceback(), _bars() as bars:
        first, every = map(int, share.split("/"))
        todo = benchmark.jobs()[first::every]
        task = bars.add_task("Jobs", total=len(todo))
        benchmark.run(out, cache or Path("ser-cache"), todo, on_job=lambda *_: bars.advance(task))
        benchmark.write(result, picture, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point."""
    app(arguments)


if __name__ == "__main__":
    main()
