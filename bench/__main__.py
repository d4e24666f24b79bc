"""``mal-kernels bench``, or ``python -m bench``: measure, draw, compare, publish."""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import figures, report
from bench.interleaved import ROOT, describe_machine, device_rates
from bench.questions import QUESTIONS, Bench

Result = dict[str, Any]
console = Console()


def measure(names: list[str], threads: int, quick: bool) -> Result:
    """Asks the questions one after the other, with progress."""
    torch.set_num_threads(threads)
    start = time.monotonic()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("device", total=None)
        machine, rates = describe_machine(threads), device_rates(0.1 if quick else 1.0)
        result: Result = {"machine": machine, "quick": quick, "rates": rates, "questions": {}}
        for number, name in enumerate(names, start=1):
            place = f"{number}/{len(names)} {name}"

            def say(text: str, place: str = place) -> None:
                progress.update(task, description=f"{place}: {text}")

            begun = time.monotonic()
            result["questions"][name] = QUESTIONS[name](Bench(quick, threads, rates, say))
            seconds = time.monotonic() - begun
            progress.console.print(f"{place} {seconds:.0f} s", highlight=False)
    machine["load_average_at_end"] = round(os.getloadavg()[0], 2)
    result["seconds"] = round(time.monotonic() - start)
    result["targets"] = report.targets(result)
    return result


def show(result: Result) -> None:
    """The tables of what was asked, and the targets."""
    console.print(report.machine_line(result), style="dim")
    if result["quick"]:
        console.print("[bold]a quick run: its times mean nothing[/bold]")
    for name in ("peers", "ops", "memory", "conversation", "overhead"):
        if name in result["questions"]:
            console.print(Markdown(report.BLOCKS[name](result)))
    console.print(Markdown(report.targets_table(result)))


def main(
    questions: Annotated[
        list[str] | None,
        typer.Argument(metavar="[QUESTION]...", help=f"Of {', '.join(QUESTIONS)}; all if none."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, few calls: does it run? No numbers.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the pictures.")] = Path(
        "mal-bench"
    ),
    result: Annotated[
        Path | None, typer.Option(help="Measure nothing: take this JSON of an earlier run.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Compare with this JSON.")] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Into bench/results, docs and the tables in README.")
    ] = False,
) -> None:
    """What the memory costs, how it scales, and side by side with what there is, on this CPU."""
    names = list(questions or QUESTIONS)
    if unknown := set(names) - set(QUESTIONS):
        raise typer.BadParameter(f"no question {sorted(unknown)}; there are {[*QUESTIONS]}")
    if publish and (quick or set(names) != set(QUESTIONS)):
        raise typer.BadParameter("--publish needs every question and no --quick")
    if missing := [p for p in ("titans_pytorch", "fla", "matplotlib") if find_spec(p) is None]:
        raise typer.BadParameter(f"{missing} not installed: pip install 'mal-kernels[bench]'")
    found = json.loads(result.read_text()) if result else measure(names, threads, quick)
    # as it comes out of JSON, so that it is the same whether measured or read
    found = json.loads(json.dumps(found))
    if publish and (found["quick"] or set(found["questions"]) != set(QUESTIONS)):
        raise typer.BadParameter(f"{result} is quick or not complete; it cannot be published")
    show(found)
    if base:
        console.print(Markdown(report.comparison(found, json.loads(base.read_text()))))
    folder, pictures = (ROOT / "bench/results", ROOT / "docs") if publish else (out, out)
    if not result or publish:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"cpu-{found['machine']['threads']}-threads.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"written: {path}", soft_wrap=True)
    pictures.mkdir(parents=True, exist_ok=True)
    written = figures.draw(found, pictures) + (report.publish(found) if publish else [])
    console.print("written:", *written, soft_wrap=True)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
