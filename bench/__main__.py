"""``mal-kernels bench``, or ``python -m bench``: measure, draw, publish."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from bench import Result, figures, machine, report, schema
from bench.questions import QUESTIONS

NAMES = ("speed", *QUESTIONS)
console = Console()


def measure(names: list[str], threads: int, quick: bool, out: Path) -> Result:
    """Asks the questions one after the other; speed is pytest-benchmark's."""
    torch.set_num_threads(threads)
    result: Result = {}
    if "speed" in names:
        result |= speed(threads, quick, out)
    with machine.flushed_denormals():
        result |= {"machine": machine.describe(threads), "questions": {}}
        for name in (n for n in names if n in QUESTIONS):
            with console.status(name) as status:
                result["questions"][name] = QUESTIONS[name](quick, status.update)
    return result


def speed(threads: int, quick: bool, out: Path) -> Result:
    """Runs :mod:`bench.test_speed`; every op is called but not timed if ``quick``."""
    found = out / "speed.json"
    command = [sys.executable, "-m", "pytest", "bench/test_speed.py", "-q"]
    command += ["--benchmark-disable"] if quick else [f"--benchmark-json={found.resolve()}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if subprocess.run(command, cwd=machine.ROOT, env=environment).returncode:
        console.print("[bold red]some implementations differ from the reference[/bold red]")
    return {} if quick or not found.exists() else {"speed": json.loads(found.read_text())}


def load(folder: Path) -> Result:
    """A result as :func:`save` wrote it."""
    result: Result = json.loads((folder / "questions.json").read_text())
    path = folder / "speed.json"
    return result | ({"speed": json.loads(path.read_text())} if path.exists() else {})


def save(result: Result, folder: Path) -> None:
    """``speed.json`` is pytest-benchmark's, ``questions.json`` holds the rest."""
    rest = {name: value for name, value in result.items() if name != "speed"}
    (folder / "questions.json").write_text(json.dumps(rest, indent=1) + "\n")
    if "speed" in result:
        schema.write(folder / "speed.json", result["speed"])


def main(
    questions: Annotated[
        list[str] | None,
        typer.Argument(metavar="[QUESTION]...", help=f"Of {', '.join(NAMES)}; all if none."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, few calls: does it run? No numbers.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the pictures.")] = Path(
        "mal-bench"
    ),
    result: Annotated[
        Path | None, typer.Option(help="Measure nothing: take this folder of an earlier run.")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Into bench/results, docs and the tables in README.")
    ] = False,
) -> None:
    """Measure what the memory costs on this CPU, how it scales, and its rivals beside it."""
    names = list(questions or NAMES)
    if unknown := set(names) - set(NAMES):
        raise typer.BadParameter(f"no question {sorted(unknown)}; there are {[*NAMES]}")
    needed = ("titans_pytorch", "pytest_benchmark", "matplotlib")
    if missing := [p for p in needed if find_spec(p) is None]:
        raise typer.BadParameter(f"{missing} not installed: pip install 'mal-kernels[bench]'")
    out.mkdir(parents=True, exist_ok=True)
    found = load(result) if result else measure(names, threads, quick, out)
    if publish and (quick or not {"speed"} <= {*found} or {*found["questions"]} != {*QUESTIONS}):
        raise typer.BadParameter("--publish needs every question, answered without --quick")
    # as it comes out of JSON, so that it is the same whether measured or read
    found = json.loads(json.dumps(found))
    show(found)
    if quick:
        console.print("a quick run: its numbers mean nothing, and nothing is written")
        return
    folder, pictures = out, out
    if publish:
        folder = machine.ROOT / f"bench/results/cpu-{found['machine']['threads']}-threads"
        folder.mkdir(parents=True, exist_ok=True)
        pictures = machine.ROOT / "docs"
    save(found, folder)
    written = figures.draw(found, pictures) + (report.publish(found) if publish else [])
    console.print("written:", folder, *written, soft_wrap=True)


def show(result: Result) -> None:
    """The tables of what was asked, and the targets."""
    asked = {"machine", "targets", *result["questions"]}
    asked |= {"peers", "ops"} if "speed" in result else set()
    for name in (name for name in report.BLOCKS if name in asked):
        console.print(Markdown(report.BLOCKS[name](result)))


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
