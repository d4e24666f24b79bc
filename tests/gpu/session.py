"""A session on a machine with one NVIDIA GPU: ``bench/gpu_session.sh --help``.

Environment, build of the CUDA library, parity tests, compute-sanitizer, times, profile: each step
is a process with a limit of its own, and what is known is written after each, so that a crash or a
time-out loses one step only. The kernels of Triton and of CUDA go through the same steps; where
both serve an op they are timed in turns. An op that fails a test or a sanitizer with a backend, or
differs there from the reference on what is timed, is not timed with it. A dry run goes through the
steps in miniature on a CPU, kernels in Triton's interpreter and in the emulation of csrc/emu; its
times mean nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import schema
from bench.gpu.report import measured, show, speeds, targets
from bench.gpu.steps import OPS
from bench.machine import ROOT, code_version
from mal_kernels._cuda.build import find_nvcc
from mal_kernels._native.build import BuildError
from mal_kernels.cli import version
from mal_kernels.ops._backend import CUDA_OPS, architecture

PYTHON = sys.executable
PACKAGES = ("torch", "triton", "titans-pytorch", "numpy", "pytest")
# step of bench.gpu.steps: its limit in seconds, and the ops that it times
TIMED: dict[str, tuple[int, tuple[str, ...]]] = {
    "ceilings": (40, ()),
    "read_hidden": (40, ("aligned_residual_read",)),
    "read": (40, ("memory_read",)),
    "write": (40, ("memory_update",)),
    "turn": (40, ("aligned_residual_read", "memory_update")),
    "decode": (40, ("neural_memory",)),
    "one_dialogue": (40, ("neural_memory",)),
    "train": (90, ("neural_memory",)),
    "train_writes": (90, ("memory_update",)),
    "peer": (60, ("neural_memory",)),
    "scan": (40, ("momentum_scan",)),
    "profile": (40, ("neural_memory",)),
    "closed_form": (150, ("neural_memory",)),
}
PARITY_LIMIT, TOOL_LIMIT, BUILD_LIMIT = 240, 75, 180
TOOLS = ("memcheck", "racecheck", "synccheck")
# A loan of fifteen minutes in two calls, most valuable facts first: the seconds of a call, and what
# each of its steps is sure to get. A step may take what earlier ones have left over.
CALLS: dict[int, tuple[int, dict[str, int]]] = {
    1: (
        330,
        {
            "environment": 5, "build": 15, "wrappers": 20, "ceilings": 10, "turn": 25,
            "read_hidden": 20, "write": 20, "train": 60, "one_dialogue": 20,
            "memcheck_cuda": 40, "memcheck_triton": 45, "parity_cuda": 50,
        },
    ),
    2: (
        400,
        {
            "environment": 5, "build": 5, "parity_triton": 170, "train_writes": 30,
            "scan": 15, "decode": 15, "read": 15, "profile": 20, "racecheck_cuda": 30,
            "synccheck_cuda": 20, "peer": 25, "closed_form": 50,
        },
    ),
}  # fmt: skip
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PYTEST = [PYTHON, "-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider"]
# a test ends after half a minute, and its process with an error of the device
GUARDED = ["--timeout", "30", "--timeout-method", "thread", "-p", "tests.gpu.guard"]
WRAPPER_TESTS = [*PYTEST, "-m", "gpu", "tests/kernels/test_cuda_wrappers.py"]
DRY_RUN_TESTS = {
    "triton": "test_memory_read and (one or no) or test_momentum_scan and bare",
    "cuda": "test_wrapper and emulated",
}
console = Console()


@dataclass
class Session:
    """A session holds what is known so far and runs the steps."""

    out: Path
    logs: Path
    dry_run: bool
    deadline: float
    result: dict[str, Any] = field(default_factory=dict)
    failed: set[tuple[str, str]] = field(default_factory=set)  # backend and op
    lock: threading.RLock = field(default_factory=threading.RLock)
    reserved: float = 0  # seconds of the steps to come

    def save(self) -> None:
        """Writes the result as it stands."""
        self.result["timings"] = self.result.get("timings", {})
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.result, indent=2) + "\n")

    def note(self, step: str, status: str, seconds: float = 0.0) -> None:
        """Records how a step ended."""
        with self.lock:
            steps = self.result.setdefault("steps", {})
            steps[step] = {"status": status, "seconds": round(seconds, 1)}
            console.print(f"{step:<36} {seconds:6.1f} s  {status}", highlight=False)
            self.save()

    def fail(self, backend: str, ops: Iterable[str]) -> None:
        """From now on ``backend`` is not timed on ``ops``."""
        with self.lock:
            self.failed |= {(backend, op) for op in ops}
            self.result["failed"] = sorted(" ".join(pair) for pair in self.failed)
            self.save()

    def run(self, step: str, command: Sequence[str], limit: float, **environment: str) -> str:
        """Runs a command with its output in ``logs / step.log``, notes and returns how it ended."""
        left = self.deadline - time.monotonic() - self.reserved
        if left < 5:
            self.note(step, "skipped: no time left")
            return "skipped"
        start, log = time.monotonic(), self.logs / f"{step}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment() | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a time-out ends its children too
            )
            try:
                code = process.wait(min(limit, left))
                status = "passed" if code == 0 else f"failed: {_last_words(log) or f'exit {code}'}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                status = f"timed out after {min(limit, left):.0f} s"
        self.note(step, status, time.monotonic() - start)
        archive = self.out.with_name("logs.tar.gz")  # one, for a machine that gives back few files
        with self.lock, tarfile.open(archive, "w:gz") as file:
            file.add(self.logs, "logs")
        return status

    def _environment(self) -> dict[str, str]:
        # a shell's choice must not decide what is measured
        clean = {k: v for k, v in os.environ.items() if k not in ("MAL_BACKEND", "MAL_CHECK")}
        dry = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if self.dry_run else {}
        return clean | {"PYTHONUNBUFFERED": "1"} | dry


# --- steps ----------------------------------------------------------------------------------------


def environment(session: Session, commit: str | None) -> None:
    """Device, versions and commit."""
    found: dict[str, Any] = {
        "dry_run": session.dry_run,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        **code_version(),
        "device": "cpu (dry run: the times mean nothing)",
    }
    if commit:
        found["commit"] = commit
    if not session.dry_run:
        card = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw", "--format=csv"]
        found |= {
            "device": card.name,
            "architecture": architecture(torch.device("cuda")),
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "cuda": torch.version.cuda,
            "nvcc": _nvcc(),
            "nvcc_flags": os.environ.get("MAL_NVCC_FLAGS", ""),
            "nvidia_smi": subprocess.run(query, capture_output=True, text=True).stdout.split("\n"),
        }
    session.result["environment"] = found
    session.note("environment", "passed")


def build(session: Session) -> None:
    """The CUDA library: by nvcc for this GPU, in a dry run by g++ for the emulation."""
    # the library of the package or of the cache, if one was carried along
    code = "import torch; from mal_kernels._cuda import library as b; b.load({})"
    command = [PYTHON, "-c", code.format("torch.cuda.get_device_capability()")]
    if session.dry_run:
        code = "import pathlib, mal_kernels.testing.emulation as e; e.library(pathlib.Path({!r}))"
        command = [PYTHON, "-c", code.format(str(session.logs))]
    if session.run("build", command, BUILD_LIMIT) != "passed":
        session.fail("cuda", CUDA_OPS)


def parity(session: Session, backend: str) -> None:
    """The tests marked gpu; in a dry run a few of them, interpreted or emulated.

    Warnings are no errors here: torch differs from the one that the suite is written for.
    """
    step = f"parity_{backend}"
    if session.failed >= {(backend, op) for op in OPS[backend]}:
        session.note(step, "skipped: the library is not built")
        return
    tests = sorted(
        str(p.relative_to(ROOT)) for p in ROOT.glob(f"tests/kernels/test_{backend}_*.py")
    )
    command = [*PYTEST, *tests]
    if session.dry_run:
        command += ["-k", DRY_RUN_TESTS[backend]]
    else:
        command += ["-m", "gpu", *GUARDED]
        if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
            command += ["-n", str(workers())]
    collected = session.logs / f"{step}.collected"
    status = session.run(step, command, PARITY_LIMIT, MAL_COLLECTED=str(collected))
    if status == "skipped":
        return
    counts = outcomes((session.logs / f"{step}.log").read_text(), backend)
    session.result.setdefault("parity", {})[backend] = counts
    wrong = [op for op, count in counts.items() if count["failed"]]
    if status.startswith("timed out"):  # what has not come up yet may be what hangs
        wrong += unfinished(counts, collected, backend)
    if wrong or status != "passed":
        session.fail(backend, wrong or OPS[backend])
    session.save()


def unfinished(counts: dict[str, Any], collected: Path, backend: str) -> list[str]:
    """Ops of which not every test has ended; all, where what was collected isn't known."""
    names = collected.read_text().splitlines() if collected.exists() else []
    if not names:
        return [*counts]
    all_of = outcomes("\n".join(f"{name} PASSED" for name in names), backend)
    return [
        op
        for op, count in counts.items()
        if count["passed"] + len(count["failed"]) < all_of[op]["passed"]
    ]


def workers() -> int:
    """Processes at once, where the GPU is not what they wait for."""
    return min(12, os.cpu_count() or 1)


def outcomes(log: str, backend: str) -> dict[str, Any]:
    """How many tests of each op passed and which failed, from pytest's verbose output.

    A test that names no op speaks for all of them.
    """
    counts: dict[str, Any] = {op: {"passed": 0, "failed": []} for op in OPS[backend]}
    serial = re.findall(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR)", log, re.M)
    parallel = re.findall(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR) (tests/\S+?::.+?)\s*$", log, re.M)
    for test, outcome in [*serial, *((test, outcome) for outcome, test in parallel)]:
        named = {op for op in OPS["triton"] if op in test}
        if "neural_memory" in named:  # without queries it is memory_update
            named.add("memory_update")
        for op in (named or set(counts)) & set(counts):
            if outcome == "PASSED":
                counts[op]["passed"] += 1
            else:
                counts[op]["failed"].append(test)
    return counts


def wrappers(session: Session) -> None:
    """Every wrapper around an instruction of CUDA, on its own; a wrong one makes all ops wrong."""
    if not session.dry_run and session.run("wrappers", WRAPPER_TESTS, TOOL_LIMIT) != "passed":
        session.fail("cuda", CUDA_OPS)


def sanitize(session: Session, backend: str, tools: Sequence[str] = TOOLS) -> None:
    """compute-sanitizer over small shapes of every op, all at once; in a dry run without it."""
    exercise = [PYTHON, "-m", "bench.gpu.steps", "exercise"]
    if session.failed >= {(backend, op) for op in OPS[backend]}:
        session.note(f"sanitize_{backend}", "skipped: all its ops failed before")
        return
    if session.dry_run:
        command = [*exercise, str(session.logs / f"exercise_{backend}.json"), backend]
        if backend == "triton":  # the interpreter takes minutes for the others
            command += ["--op", "memory_read"]
        session.run(f"exercise_{backend}", command, TOOL_LIMIT)
        return
    program = shutil.which("compute-sanitizer")
    if program is None:
        session.note(f"sanitize_{backend}", "skipped: compute-sanitizer is not installed")
        return

    def watch(tool: str, name: str, ops: Sequence[str], command: Sequence[str]) -> None:
        watcher: list[str] = [program, "--tool", tool, "--error-exitcode", "9"]
        watcher += ["--target-processes", "application-only"]
        if tool == "memcheck":  # a launch that is refused raises in Python
            watcher += ["--report-api-errors", "no"]
        step = f"{tool}_{name}"
        # without torch's cache of device memory, so that every tensor has an end
        ended = session.run(step, [*watcher, *command], TOOL_LIMIT, **NO_CACHE)
        if ended.startswith("failed"):
            session.fail(backend, ops)

    jobs: list[tuple[str, str, Sequence[str], Sequence[str]]] = []
    for tool in tools:
        for op in OPS[backend]:
            out = str(session.logs / f"{tool}_{backend}_{op}.json")
            jobs.append((tool, f"{backend}_{op}", [op], [*exercise, out, backend, "--op", op]))
        if backend == "cuda":
            jobs.append((tool, "wrappers", CUDA_OPS, WRAPPER_TESTS))
    with ThreadPoolExecutor(workers()) as pool:
        list(pool.map(watch, *zip(*jobs, strict=True)))


def timed(session: Session, step: str) -> None:
    """A step of :mod:`bench.gpu.steps`, for the backends that serve its ops and have not failed."""
    ops = TIMED[step][1]
    if step == "peer" and importlib.util.find_spec("titans_pytorch") is None:
        session.note(step, "skipped: titans-pytorch is not installed")
        return
    backends = []
    for backend in (b for b, served in OPS.items() if set(ops) <= set(served)):
        if wrong := [op for op in ops if (backend, op) in session.failed]:
            session.note(f"{step} {backend}", f"skipped: {' and '.join(wrong)} failed before")
        else:
            backends.append(backend)
    if not backends:
        return
    status, found_wrong = _measure(session, step, step, backends)
    for backend in found_wrong:
        session.fail(backend, ops)
    if status.startswith("failed") and not found_wrong and backends == [*OPS]:
        again, _ = _measure(session, step, f"{step} without cuda", ["triton"])
        if again == "passed":
            session.fail("cuda", ops)


def _measure(
    session: Session, step: str, name: str, backends: Sequence[str]
) -> tuple[str, set[str]]:
    """How a process with the step ended, and which backends were wrong."""
    found = session.logs / f"{step}.json"
    found.unlink(missing_ok=True)
    command = [PYTHON, "-m", "bench.gpu.steps", step, str(found), *backends]
    status = session.run(name, command, TIMED[step][0])
    results = json.loads(found.read_text()) if found.exists() else {}
    found.unlink(missing_ok=True)
    for name in ("ceilings", "profile"):
        if name in results:
            session.result[name] = results.pop(name)
    session.result["timings"] = session.result.get("timings", {}) | results
    session.save()
    return status, {backend for row in results.values() for backend in row.get("wrong", ())}


# --- the whole ------------------------------------------------------------------------------------


def _nvcc() -> str:
    """Its release, or why there is none."""
    try:
        done = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True)
    except BuildError as error:
        return str(error)
    return done.stdout.strip().split("\n")[-1]


def _last_words(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip("│╰─╯ ") for line in log.read_text().splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _plan(session: Session, commit: str | None) -> dict[str, Callable[[], object]]:
    """Every step by name, in order: the CUDA kernels' tests first, as they are the youngest."""
    return {
        "environment": lambda: environment(session, commit),
        "build": lambda: build(session),
        "parity_cuda": lambda: parity(session, "cuda"),
        "sanitize_cuda": lambda: sanitize(session, "cuda"),
        "parity_triton": lambda: parity(session, "triton"),
        **{name: functools.partial(timed, session, name) for name in TIMED},
        "sanitize_triton": lambda: sanitize(session, "triton"),
    }


def _plan_of_calls(session: Session, commit: str | None) -> dict[str, Callable[[], object]]:
    """The steps of :data:`CALLS` besides: each sanitizer on its own."""
    steps = {"wrappers": lambda: wrappers(session)}
    for tool in TOOLS:
        for backend in OPS:
            steps[f"{tool}_{backend}"] = functools.partial(sanitize, session, backend, (tool,))
    return _plan(session, commit) | steps


def plan_table() -> Table:
    """The two calls with the seconds of their steps."""
    table = Table("call", "step", "sure of", "at the latest after", title="Seconds on the GPU")
    for call, (limit, budgets) in CALLS.items():
        spent = 0
        for step, seconds in budgets.items():
            spent += seconds
            table.add_row(str(call), step, f"{seconds}", f"{spent} of {limit}")
    return table


def main(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="In miniature, on a CPU; never in bench/results.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(envvar="OUT", help="Folder of the results; bench/results if left out."),
    ] = None,
    seconds: Annotated[int, typer.Option(min=10, help="For everything together.")] = 570,
    step: Annotated[list[str] | None, typer.Option(help="Only these; all if left out.")] = None,
    commit: Annotated[
        str | None, typer.Option(help="What is measured, where there is no git repository.")
    ] = None,
    call: Annotated[
        int | None, typer.Option(min=1, max=2, help="One half of a session, see --plan.")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Show the two calls and their seconds; run nothing.")
    ] = False,
) -> None:
    """Parity, sanitizers, times against the targets, and profile of the kernels on this GPU."""
    if plan_only:
        console.print(plan_table())
        return
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is visible; a CPU can do --dry-run")
    scratch = Path(tempfile.mkdtemp(prefix="gpu-session-"))
    name = "dry-run" if dry_run else torch.cuda.get_device_name(0).lower().replace(" ", "-")
    folder = out or (scratch if dry_run else ROOT / "bench/results")
    if dry_run and folder.resolve() == (ROOT / "bench/results").resolve():
        raise typer.BadParameter("a dry run measures nothing that belongs into bench/results")
    folder.mkdir(parents=True, exist_ok=True)
    seconds, budgets = CALLS[call] if call else (seconds, {})
    deadline = time.monotonic() + seconds
    name += f"-call-{call}" if call else ""
    session = Session(folder / f"gpu-{name}.json", scratch / "logs", dry_run, deadline)
    session.logs.mkdir()
    plan = _plan_of_calls(session, commit) if call else _plan(session, commit)
    if unknown := set(step or ()) - set(plan):
        raise typer.BadParameter(f"no step {sorted(unknown)}; there are {[*plan]}")
    chosen = [*(step or budgets or plan)]
    for i, name in enumerate(chosen):
        session.reserved = sum(budgets.get(later, 0) for later in chosen[i + 1 :])
        plan[name]()
    session.result["targets"] = targets(session.result)
    session.save()
    schema.write(session.out.with_suffix(".speed.json"), speeds(session.result))
    show(console, session.result)
    if not dry_run:
        # what `auto` would follow if it were committed as mal_kernels/ops/measured.json
        lines = ",\n".join(json.dumps(m) for m in measured(session.result))
        (folder / "measured.json").write_text(f"[\n{lines}\n]\n")
    console.print(f"results in {session.out}, logs in {session.logs}", soft_wrap=True)
    if session.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
