"""A session on a machine with one NVIDIA GPU: ``bench/gpu_session.sh --help``.

Environment, parity tests, times, profile, compute-sanitizer: each step is a process with a limit of
its own, and what is known is written after each, so that a crash or a time-out loses one step only.
An op whose parity tests fail is not timed. A dry run goes through the same steps in miniature on a
CPU, kernels in Triton's interpreter; its times mean nothing.
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
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench.gpu_report import measured, show, targets
from bench.measure import ROOT, git, version
from mal_kernels.ops._backend import TRITON_OPS, architecture

PYTHON = sys.executable
PACKAGES = ("torch", "triton", "titans-pytorch", "numpy", "pytest")
# step of bench.gpu_steps: its limit in seconds, and the op that it times
TIMED = {
    "ceilings": (40, None),
    "read_hidden": (40, "aligned_residual_read"),
    "read": (40, "memory_read"),
    "write": (40, "memory_update"),
    "decode": (40, "neural_memory"),
    "train": (90, "neural_memory"),
    "peer": (60, "neural_memory"),
    "scan": (40, "momentum_scan"),
    "profile": (40, "neural_memory"),
    "closed_form": (150, "neural_memory"),
}
PARITY_LIMIT, TOOL_LIMIT = 240, 75
console = Console()


@dataclass
class Session:
    """What a session knows so far, and how it runs a step."""

    out: Path
    logs: Path
    dry_run: bool
    deadline: float
    result: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Writes the result as it stands."""
        self.result["timings"] = self.result.get("timings", {})
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.result, indent=2) + "\n")

    def note(self, step: str, status: str, seconds: float = 0.0) -> None:
        """Records how a step ended."""
        steps = self.result.setdefault("steps", {})
        steps[step] = {"status": status, "seconds": round(seconds, 1)}
        console.print(f"{step:<12} {seconds:6.1f} s  {status}", highlight=False)
        self.save()

    def run(self, step: str, command: Sequence[str], limit: float, **environment: str) -> str:
        """Runs a command with its output in ``logs / step.log``, notes and returns how it ended."""
        left = self.deadline - time.monotonic()
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
        "commit": commit or git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "mal_kernels", "bench")),
        "device": "cpu (dry run: the times mean nothing)",
    }
    if not session.dry_run:
        card = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw", "--format=csv"]
        found |= {
            "device": card.name,
            "architecture": architecture(torch.device("cuda")),
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "cuda": torch.version.cuda,
            "nvidia_smi": subprocess.run(query, capture_output=True, text=True).stdout.split("\n"),
        }
    session.result["environment"] = found
    session.note("environment", "passed")


def parity(session: Session) -> set[str]:
    """The tests marked gpu; in a dry run a few of them, interpreted. Returns the ops that failed.

    Warnings are no errors here: torch differs from the one that the suite is written for.
    """
    tests = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/test_triton_*.py"))
    command = [PYTHON, "-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider", *tests]
    if session.dry_run:
        command += ["-k", "test_memory_read and (one or no) or test_momentum_scan and bare"]
    else:
        command += ["-m", "gpu"]
        if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
            command += ["-n", str(min(12, os.cpu_count() or 1))]
    status = session.run("parity", command, PARITY_LIMIT)
    counts = outcomes((session.logs / "parity.log").read_text()) if status != "skipped" else {}
    session.result["parity"] = counts
    session.save()
    return {op for op, count in counts.items() if count["failed"]}


def outcomes(log: str) -> dict[str, Any]:
    """How many tests of each op passed and which failed, from pytest's verbose output.

    A test that names no op speaks for all of them; ``memory_update`` is ``neural_memory`` without
    queries.
    """
    counts: dict[str, Any] = {op: {"passed": 0, "failed": []} for op in TRITON_OPS}
    serial = re.findall(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR)", log, re.M)
    parallel = re.findall(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR) (tests/\S+?::.+?)\s*$", log, re.M)
    for test, outcome in [*serial, *((test, outcome) for outcome, test in parallel)]:
        named = [op for op in TRITON_OPS if op in test]
        if "neural_memory" in named:
            named.append("memory_update")
        for op in set(named or TRITON_OPS):
            if outcome == "PASSED":
                counts[op]["passed"] += 1
            else:
                counts[op]["failed"].append(test)
    return counts


def timed(session: Session, step: str, failed: set[str]) -> None:
    """A step of :mod:`bench.gpu_steps`, unless its op is wrong or a library is missing."""
    limit, op = TIMED[step]
    if op in failed:
        session.note(step, f"skipped: parity tests of {op} failed")
    elif step == "peer" and importlib.util.find_spec("titans_pytorch") is None:
        session.note(step, "skipped: titans-pytorch is not installed")
    else:
        found = session.logs / f"{step}.json"
        found.unlink(missing_ok=True)
        session.run(step, [PYTHON, "-m", "bench.gpu_steps", step, str(found)], limit)
        if found.exists():
            results = json.loads(found.read_text())
            found.unlink()
            for name in ("ceilings", "profile"):
                if name in results:
                    session.result[name] = results.pop(name)
            session.result["timings"] |= results
            session.save()


def sanitize(session: Session, tool: str) -> None:
    """compute-sanitizer over small shapes of every op; without torch's cache of device memory."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        session.note(tool, "skipped: compute-sanitizer is not installed")
        return
    command = [program, "--tool", tool, "--error-exitcode", "9", PYTHON, "-m", "bench.gpu_steps"]
    command += ["exercise", str(session.logs / f"{tool}.json")]
    session.run(tool, command, TOOL_LIMIT, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def counters(session: Session) -> None:
    """Hardware counters of the two hottest kernels of the profile."""
    program = shutil.which("ncu")
    hottest = list(session.result.get("profile", {}).get("microseconds", {}))[:2]
    if program is None or session.dry_run or not hottest:
        why = "ncu is not installed" if program is None else "there is no profile of a GPU"
        session.note("ncu", f"skipped: {why}")
        return
    names = "|".join(re.escape(name) for name in hottest)
    command = [program, "--clock-control", "none", "--kernel-name", f"regex:{names}"]
    command += ["--launch-count", "2", "--section", "SpeedOfLight", "--section", "Occupancy"]
    command += ["--section", "MemoryWorkloadAnalysis", PYTHON, "-m", "bench.gpu_steps", "hot"]
    session.run("ncu", [*command, str(session.logs / "hot.json")], TOOL_LIMIT)


# --- the whole ------------------------------------------------------------------------------------


def _last_words(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip("│╰─╯ ") for line in log.read_text().splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _plan(session: Session, commit: str | None) -> dict[str, Callable[[set[str]], object]]:
    """Every step by name, in order; each is given the ops that failed."""
    return {
        "environment": lambda _: environment(session, commit),
        "parity": lambda failed: failed.update(parity(session)),
        **{name: functools.partial(timed, session, name) for name in TIMED},
        "memcheck": lambda _: sanitize(session, "memcheck"),
        "racecheck": lambda _: sanitize(session, "racecheck"),
        "ncu": lambda _: counters(session),
    }


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
) -> None:
    """Parity, times against the targets, and profile of the Triton kernels on this GPU."""
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is visible; a CPU can do --dry-run")
    scratch = Path(tempfile.mkdtemp(prefix="gpu-session-"))
    name = "dry-run" if dry_run else torch.cuda.get_device_name(0).lower().replace(" ", "-")
    folder = out or (scratch if dry_run else ROOT / "bench/results")
    if dry_run and folder.resolve() == (ROOT / "bench/results").resolve():
        raise typer.BadParameter("a dry run measures nothing that belongs into bench/results")
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    session = Session(folder / f"gpu-{name}.json", out or scratch, dry_run, deadline)
    plan, failed = _plan(session, commit), set[str]()
    if unknown := set(step or ()) - set(plan):
        raise typer.BadParameter(f"no step {sorted(unknown)}; there are {[*plan]}")
    for name in step or plan:
        plan[name](failed)
    session.result["targets"] = targets(session.result)
    session.save()
    show(console, session.result)
    if not dry_run:
        # what `auto` would follow if it were committed as mal_kernels/ops/measured.json
        lines = ",\n".join(json.dumps(m) for m in measured(session.result))
        (folder / "measured.json").write_text(f"[\n{lines}\n]\n")
    console.print(f"results in {session.out}, logs in {session.logs}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
