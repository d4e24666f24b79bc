"""The ``mal-kernels`` command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from mal_kernels import __version__, ops
from mal_kernels.console import errors_without_traceback
from mal_kernels.errors import ArgumentError, BackendUnavailable, MALError, needs

# what doctor reports, and how to get it
PACKAGES = {
    "torch": "see pytorch.org",
    "transformers": "pip install 'mal-kernels[hf]'",
    "triton": "comes with torch for Linux and CUDA",
    "soundfile": "pip install 'mal-kernels[audio]'",
    "soxr": "pip install 'mal-kernels[audio]'",
    "matplotlib": "pip install 'mal-kernels[demo]'",
}

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mal-kernels {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """Neural memory for frozen audio language models."""


@app.command()
def demo(
    recordings: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[WAV]...", help="Your own recordings, as the turns of one dialogue."
        ),
    ] = None,
    speakers: Annotated[
        str | None,
        typer.Option(metavar="ABAB", help="Who speaks in each recording; one voice if left out."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Make the weights again from nothing first (minutes).")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Folder with weights; those of the package if left out.")
    ] = None,
    dialogues: Annotated[int, typer.Option(min=1, help="Synthetic dialogues to evaluate.")] = 250,
    seed: Annotated[int, typer.Option(min=0, help="Of the synthetic dialogues.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the figure and trained weights.")] = Path(
        "mal-demo"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Processes that render audio.")] = 2,
) -> None:
    """A small Qwen2-Audio hears dialogues with and without memory; nothing is downloaded."""
    with errors_without_traceback(), needs("demo", "the demo"):
        from mal_kernels.demo.show import run
        from mal_kernels.demo.train import Recipe

        run(
            Console(),
            recordings or (),
            speakers=speakers,
            weights=weights,
            recipe=Recipe() if train else None,
            dialogues=dialogues,
            seed=seed,
            out=out,
            workers=workers,
        )


# what follows the name of the command is for a program with a --help of its own
PASSED_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}


@app.command(**PASSED_ON)
def ser(context: typer.Context) -> None:
    """Train a memory for speech emotion on dialogues, and try to show that it does not help."""
    with errors_without_traceback(), needs("ser", "the study of speech emotion"):
        from mal_kernels.ser.__main__ import app as study
    study(context.args, prog_name="mal-kernels ser")


@app.command(**PASSED_ON)
def bench(context: typer.Context) -> None:
    """Measure what the memory costs on this CPU, beside what there is (in a clone)."""
    root = Path(__file__).parents[1]
    with errors_without_traceback():
        if not (root / "bench/__main__.py").exists():
            raise BackendUnavailable(
                "bench: it is part of the repository, not of the installed package, because it "
                "writes its results there; clone the repository and pip install -e '.[bench]'"
            )
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "bench", *context.args]
    raise typer.Exit(subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}).returncode)


@app.command()
def doctor(
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Compile every kernel and show what it costs."),
    ] = False,
    target: Annotated[
        str, typer.Option(help="What --kernels compiles for: sm_80, sm_90, sm_100 or gfx942.")
    ] = "sm_90",
) -> None:
    """Show versions, devices, and which backend every op would use and why."""
    console = Console()
    if kernels:
        with errors_without_traceback():
            _show_kernels(console, target)
        return
    versions = Table("package", "version", title="Versions", title_justify="left")
    versions.add_row("mal-kernels", __version__)
    versions.add_row("python", platform.python_version())
    for name, remedy in PACKAGES.items():
        versions.add_row(name, version(name) or f"[dim]not installed: {remedy}[/dim]")
    console.print(versions)

    devices = Table("device", "what it is", title="Devices", title_justify="left")
    for name, what in _devices():
        devices.add_row(name, what)
    console.print(devices)

    backends = Table(
        "op", "backend", "why", title="Backends of mal_kernels.ops", title_justify="left"
    )
    broken = False
    # a trailing underscore is the same op in place
    functions = {n.removesuffix("_") for n in ops.__all__ if n.islower()} - {"explain"}
    for op in sorted(functions):
        try:
            backend, why = ops.explain(op)
        except MALError as error:
            broken, backend = True, os.environ.get("MAL_BACKEND", "auto")
            why = f"[red]cannot be used:[/red] {escape(str(error))}"
        backends.add_row(op, escape(backend), why)
    console.print(backends)
    if broken:
        raise typer.Exit(1)


def _show_kernels(console: Console, target: str) -> None:
    """Every kernel at its example sizes, compiled here without a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ArgumentError("TRITON_INTERPRET=1: the kernels are interpreted; unset it to compile")
    if version("triton") is None:
        raise BackendUnavailable(f"triton: not installed; it {PACKAGES['triton']}")
    from mal_kernels._triton import aot

    if target not in aot.TARGETS:
        raise ArgumentError(f"target: got {target!r}, expected one of {[*aot.TARGETS]}")
    modules = aot.kernel_modules().values()
    examples = [item for m in modules for item in getattr(m, "EXAMPLES", {}).items()]
    table = Table("kernel", "example", "registers", "spills", "shared B", "mma", title=target)
    for name, launch in track(examples, "compiling", console=console, transient=True):
        one: Any = SimpleNamespace(EXAMPLES={name: launch})
        for report in aot.reports(one, target):
            numbers = (report.registers, report.spills, report.shared, report.mma)
            table.add_row(report.kernel, report.example, *map(str, numbers))
    console.print(table)
    if target.startswith("sm_"):
        _show_cuda_kernels(console, (int(target[3:]) // 10, 0))


def _show_cuda_kernels(console: Console, capability: tuple[int, int]) -> None:
    """Shows the kernels of ``csrc/``, where they can be compiled."""
    from mal_kernels._cuda import build
    from mal_kernels._native.build import BuildError

    target = build.target_of(capability)
    table = Table("CUDA kernel", "registers", "stack B", "spilled B", title=f"sm_{target}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            log = build.build([target], Path(folder, build.LIBRARY), ["-Xptxas=-v"])
    except BuildError as error:
        console.print(f"the CUDA kernels are not shown: {error}", highlight=False)
        return
    for cost in sorted(build.costs(log)):
        table.add_row(cost.kernel, *map(str, (cost.registers, cost.stack, cost.spills)))
    console.print(table)


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB",
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield (
            "cuda",
            f"none: {'no GPU is visible' if built else 'this torch is built for the CPU only'}",
        )
    yield "nvcc", shutil.which("nvcc") or "not on PATH: the CUDA kernels cannot be built here"
