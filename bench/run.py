"""Time and peak memory against titans-pytorch on the CPU: ``python -m bench.run --help``.

Nothing is timed before the outputs and gradients of both have been found equal on that very case.
Providers take turns, so that a busy moment of the machine meets them all alike.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.cases import CASES, Case, Step
from bench.peers import TitansPytorch
from mal_kernels import __version__
from mal_kernels.ops import neural_memory
from mal_kernels.state import MemoryState

ROOT = Path(__file__).parent.parent
MEMORY_TOKENS = (256, 512, 1024)
console = Console()


@dataclass(frozen=True)
class Provider:
    """One implementation and the steps it takes; providers with the same steps do the same work."""

    library: str
    step: Step

    @property
    def name(self) -> str:
        """As it stands in tables and JSON."""
        return f"{self.library} ({self.step} steps)"

    def build(self, case: Case) -> Callable[..., tuple[Tensor, MemoryState]]:
        """The op for this case, as a function of q, k, v, the gates and the state."""
        if self.library == "titans-pytorch":
            return TitansPytorch(
                heads=case.heads,
                head_dim=case.head_dim,
                hidden_dim=case.hidden_dim,
                chunk_size=case.chunk_size,
                step=self.step,
            )

        def op(*arguments: Any) -> tuple[Tensor, MemoryState]:
            result = neural_memory(*arguments, chunk_size=case.chunk_size, step=self.step)
            return result.output, result.state

        return op


OURS, THEIRS = Provider("mal_kernels", "token"), Provider("titans-pytorch", "token")
PROVIDERS = (OURS, THEIRS, Provider("mal_kernels", "chunk"), Provider("titans-pytorch", "chunk"))


class Workload:
    """A provider on a case, with its inputs, ready to be called again and again."""

    def __init__(self, provider: Provider, case: Case) -> None:
        self.op = provider.build(case)
        self.leaves = case.leaves(provider.step)
        generator = torch.Generator().manual_seed(1)
        self.output_grad = torch.randn(self.leaves[0].shape, generator=generator)
        if provider.step == "chunk":
            # there, a chunk's last token reads what its own chunk has written: leave it out
            self.output_grad[:, case.chunk_size - 1 :: case.chunk_size] = 0

    def run(self) -> tuple[Tensor, MemoryState]:
        """The op on the inputs, with a graph unless under ``torch.no_grad``."""
        *tensors, w1, w2, s1, s2 = self.leaves
        return self.op(*tensors, MemoryState((w1, w2), (s1, s2)))

    def forward(self) -> None:
        """The op alone."""
        with torch.no_grad():
            self.run()

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Gradients of all ten inputs; the loss weighs the output and the whole final state."""
        output, state = self.run()
        loss = (output * self.output_grad).sum()
        loss = loss + sum((x * x).sum() for x in (*state.weights, *state.momentum))
        return torch.autograd.grad(loss, self.leaves)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def agreement(ours: Workload, theirs: Workload) -> dict[str, float]:
    """Largest relative error of outputs and of gradients; raises if one is not float32 rounding."""
    seen = ours.output_grad != 0
    (a, a_state), (b, b_state) = ours.run(), theirs.run()
    ours_all = (a[seen], *a_state.weights, *a_state.momentum)
    theirs_all = (b[seen], *b_state.weights, *b_state.momentum)
    forward = max(relative_error(x, y) for x, y in zip(ours_all, theirs_all, strict=True))
    pairs = zip(ours.forward_backward(), theirs.forward_backward(), strict=True)
    backward = max(relative_error(x, y) for x, y in pairs)
    if forward > 1e-5 or backward > 1e-4:
        raise AssertionError(f"no agreement: forward {forward:.1e}, gradients {backward:.1e}")
    return {"forward": forward, "gradients": backward}


def time_in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Milliseconds of each function, one call each per round after a warm-up round."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_number:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: quantiles(ms) for name, ms in samples.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    """20 %, 50 % and 80 %."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "median": cuts[4], "p80": cuts[7]}


def measure_case(case: Case, rounds: int) -> dict[str, Any]:
    """Agreement, then times, of every provider on one case."""
    workloads = {p: Workload(p, case) for p in PROVIDERS}
    agree = {
        step: agreement(
            workloads[Provider("mal_kernels", step)], workloads[Provider("titans-pytorch", step)]
        )
        for step in ("token", "chunk")
    }
    return {
        "case": asdict(case),
        "forward_gflop": {s: case.flops(s) / 1e9 for s in ("token", "chunk")},
        "io_megabytes": case.io_bytes() / 1e6,
        "relative_error": agree,
        "forward_ms": time_in_turns({p.name: w.forward for p, w in workloads.items()}, rounds),
        "forward_backward_ms": time_in_turns(
            {p.name: w.forward_backward for p, w in workloads.items()}, rounds
        ),
    }


def peak_rss(library: str, step: Step, tokens: int, threads: int) -> int:
    """Bytes at the peak of this process after one forward and backward; call it in a fresh one."""
    torch.set_num_threads(threads)
    Workload(Provider(library, step), replace(CASES["base"], tokens=tokens)).forward_backward()
    # not getrusage: its ru_maxrss starts at the size of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_memory(threads: int) -> dict[str, Any]:
    """Peak of a fresh process over the number of tokens, and the slope: bytes per token."""
    result = {}
    for provider in PROVIDERS:
        peaks = {}
        for tokens in MEMORY_TOKENS:
            arguments = (provider.library, provider.step, tokens, threads)
            peaks[tokens] = int(
                run_python(f"import bench.run as b; print(b.peak_rss(*{arguments}))")
            )
        slope = statistics.linear_regression(list(peaks), list(peaks.values())).slope
        result[provider.name] = {"peak_bytes": peaks, "bytes_per_token": slope}
    return result


def measure_import(repeats: int = 7) -> dict[str, float]:
    """Median seconds of ``import torch`` and of ``import mal_kernels``, in turns, each fresh."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    samples: dict[str, list[float]] = {"torch": [], "mal_kernels": []}
    for _ in range(repeats):
        for name, seconds in samples.items():
            seconds.append(float(run_python(code.format(name))))
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def describe_machine(threads: int) -> dict[str, Any]:
    """Where and with what a result was obtained."""
    cpuinfo = Path("/proc/cpuinfo")
    models = cpuinfo.read_text().split("model name\t: ")[1:] if cpuinfo.exists() else []
    packages = ("torch", "titans-pytorch", "assoc-scan", "tensordict")
    return {
        "device": "cpu",
        "cpu": models[0].splitlines()[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {"mal-kernels": __version__} | {name: version(name) for name in packages},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "mal_kernels", "bench")),
        "date": time.strftime("%Y-%m-%d"),
    }


def git(*arguments: str) -> str | None:
    """Output of a git command; None where there is no repository or no commit yet."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def summarise(result: dict[str, Any]) -> dict[str, float]:
    """The ratios of the base case; above 1 means that mal_kernels is ahead."""
    base, memory, imports = result["cases"]["base"], result["memory"], result["import_seconds"]

    def times(kind: str, other: Provider) -> float:
        ratio: float = base[kind][other.name]["median"] / base[kind][OURS.name]["median"]
        return ratio

    slope = {name: row["bytes_per_token"] for name, row in memory.items()}
    chunk_gates = PROVIDERS[-1]
    return {
        "forward": times("forward_ms", THEIRS),
        "forward_backward": times("forward_backward_ms", THEIRS),
        "forward_vs_its_chunk_gates": times("forward_ms", chunk_gates),
        "forward_backward_vs_its_chunk_gates": times("forward_backward_ms", chunk_gates),
        "memory_slope": slope[THEIRS.name] / slope[OURS.name],
        "import_over_torch": imports["mal_kernels"] / imports["torch"],
    }


def show(result: dict[str, Any]) -> None:
    """The result as tables."""
    table = Table("case", "provider", "forward ms", "forward+backward ms")
    for name, row in result["cases"].items():
        for provider in PROVIDERS:
            cells = [row[kind][provider.name] for kind in ("forward_ms", "forward_backward_ms")]
            spread = [f"{c['median']:.1f} ({c['p20']:.1f}–{c['p80']:.1f})" for c in cells]
            table.add_row(name, provider.name, *spread)
        table.add_section()
    console.print(table)
    memory = Table("provider", "peak memory, bytes per token")
    for name, row in result["memory"].items():
        memory.add_row(name, f"{row['bytes_per_token']:,.0f}")
    console.print(memory)
    ratios = Table("base case, mal_kernels with token steps", "times")
    for name, ratio in result["summary"].items():
        ratios.add_row(name.replace("_", " "), f"{ratio:.2f}")
    console.print(ratios)


def main(
    case: Annotated[list[str] | None, typer.Option(help="Besides base; all if not given.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls per provider.")] = 10,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; by default in bench/results.")
    ] = None,
) -> None:
    """Compare mal_kernels with titans-pytorch and write a JSON file."""
    out = out or ROOT / f"bench/results/cpu-{threads}-threads.json"
    torch.set_num_threads(threads)
    result: dict[str, Any] = {"machine": describe_machine(threads), "rounds": rounds, "cases": {}}
    for name in dict.fromkeys(("base", *(case or CASES))):
        console.print(f"timing {name} ...")
        result["cases"][name] = measure_case(CASES[name], rounds)
    console.print("measuring memory and imports in fresh processes ...")
    result["memory"] = measure_memory(threads)
    result["import_seconds"] = measure_import()
    result["summary"] = summarise(result)
    result["machine"]["load_average_at_end"] = round(os.getloadavg()[0], 2)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
