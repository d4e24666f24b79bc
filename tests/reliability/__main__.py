"""What happens when things fail, at length: ``python -m tests.reliability``.

Parts, each in ``bench/results/reliability.json`` with the versions it ran on: ``soak`` and
``memory`` (:mod:`tests.reliability.soak`), ``interrupts``, ``load``, ``fuzz``, ``drift``, the
distance of a float32 state from its float64 twin over 100,000 turns, and ``vllm``
(:mod:`tests.reliability.served`), where a ``vllm`` is on the PATH. About half an hour on one core;
the tests run short versions of all but the last.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mal_kernels import MemoryState, NeuralMemory, __version__
from mal_kernels.store import DirectoryStore
from tests.reliability.fuzz import fuzz
from tests.reliability.interrupts import many_interrupts
from tests.reliability.load import load
from tests.reliability.served import served
from tests.reliability.soak import soak, steady

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "reliability.json"
console = Console()
Report = Callable[[int], object]


def drift(turns: int, report: Report = lambda done: None, marks: int = 10) -> dict[str, Any]:
    """A float32 state beside its float64 twin, which hears the same noise.

    Four memories side by side, written as MAL writes: one chunk step per turn at the highest write
    rate, decay toward the initial weights, clipped gradients. The second has the gates that a new
    adapter begins with. The last two hardly forget: their writes amplify any difference, so that
    they end as far from their twins as from any other state, and only their norms are bounded.

    Returns:
        By number of turns and memory, the RMS of the difference over that of the float64 state, and
        the norm of the largest head.
    """
    decays, momenta = (1e-1, 1e-2, 1e-3, 1e-4), (0.0, 0.01, 0.5, 0.9)
    torch.manual_seed(0)
    memory = NeuralMemory(16, heads=2, head_dim=8).double()
    init = memory.initial_state(4).detach()
    states = {torch.float32: init.map(torch.Tensor.float), torch.float64: init}
    table = []
    draw = torch.Generator().manual_seed(1)
    for turn in range(1, turns + 1):
        tokens = torch.randn(4, 4, 2, 16, generator=draw)
        for dtype, state in states.items():
            states[dtype] = one_turn(tokens.to(dtype), state, init, decays, momenta)
        if turn % max(1, turns // marks) == 0:
            low, high = states[torch.float32], states[torch.float64]
            table.append(
                {
                    "turns": turn,
                    "rms_errors": rms_errors(low, high),
                    "norms": low.norm().amax(1).tolist(),
                }
            )
        report(turn)
    return {"table": table, "decays": decays, "momenta": momenta}


def one_turn(
    tokens: torch.Tensor,
    state: MemoryState,
    init: MemoryState,
    decays: tuple[float, ...],
    momenta: tuple[float, ...],
) -> MemoryState:
    """Writes keys and values ``[4, T, H, 2 D]`` into four memories, each with gates of its own."""
    from mal_kernels.ops import memory_update

    keys, values = tokens.chunk(2, -1)
    rows, heads = tokens.shape[0], tokens.shape[2]
    gates = [
        torch.tensor(gate, dtype=tokens.dtype).view(rows, 1, 1).expand(rows, 1, heads)
        for gate in (momenta, decays)
    ]
    lr = torch.full(tokens.shape[:3], 0.5 / tokens.shape[1], dtype=tokens.dtype)
    return memory_update(
        torch.nn.functional.normalize(keys, dim=-1),
        values,
        lr,
        gates[0],
        gates[1],
        state,
        step="chunk",
        max_grad_norm=1.0,
        init=[w.to(tokens.dtype) for w in init.weights],
        backend="reference",
    ).state


def rms_errors(low: MemoryState, high: MemoryState) -> list[float]:
    """Of each of the four memories, over all its weights."""
    errors = []
    for row in range(low.batch_size):
        a, b = (torch.cat([w[row].double().flatten() for w in x.weights]) for x in (low, high))
        errors.append(float((a - b).norm() / b.norm()))
    return errors


def run_soak(report: Report, scale: float) -> dict[str, Any]:
    """10,000 turns of 200 dialogues, each played by two processes."""
    return soak(max(8, round(200 * scale)), 50, on_progress=report)


def run_interrupts(report: Report, scale: float) -> dict[str, Any]:
    """50,000 interrupts of turns in a folder."""
    return {**many_interrupts(max(1000, round(50_000 * scale)), on_progress=report)}


def run_memory(report: Report, scale: float) -> dict[str, Any]:
    """10,000 turns of 200 dialogues in one process."""
    return {"table": steady(max(8, round(200 * scale)), 50, on_progress=report)}


def run_load(report: Report, scale: float) -> dict[str, Any]:
    """64 callers of 16 turns, with states in a folder."""
    done = iter(range(1, 10**9))
    with tempfile.TemporaryDirectory() as folder:
        dialogues = max(4, round(64 * scale))
        return load(
            dialogues, 16, backing=DirectoryStore(folder), on_turn=lambda: report(next(done))
        )


def run_fuzz(report: Report, scale: float) -> dict[str, Any]:
    """105,000 cases, of which a finding fails the run."""
    done = iter(range(1, 10**9))
    tried, findings = fuzz(round(105_000 * scale), on_case=lambda *_: report(next(done)))
    for finding in findings[:20]:
        console.print(finding, style="red")
    cases = sum(sum(counts.values()) for counts in tried.values()) + len(findings)
    return {"cases": cases, "by_target": tried, "findings": findings}


def run_drift(report: Report, scale: float) -> dict[str, Any]:
    """100,000 turns."""
    return drift(round(100_000 * scale), report)


def run_vllm(report: Report, scale: float) -> dict[str, Any]:
    """32 callers of 8 turns before a real server."""
    done = iter(range(1, 10**9))
    return served(max(2, round(32 * scale)), 8, on_turn=lambda: report(next(done)))


# name: (what, its length)
PARTS: dict[str, tuple[Callable[[Report, float], dict[str, Any]], int]] = {
    "soak": (run_soak, 10_000),
    "interrupts": (run_interrupts, 50_000),
    "memory": (run_memory, 10_000),
    "load": (run_load, 1024),
    "fuzz": (run_fuzz, 105_000),
    "drift": (run_drift, 100_000),
    "vllm": (run_vllm, 256),
}


def about() -> dict[str, Any]:
    """When and on what a part ran."""
    names = ("torch", "transformers", "safetensors", "numpy", "soundfile")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "mal_kernels": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[1], 1),  # of others too: what latencies are worth
        **{name: version(name) for name in names},
    }


def run_part(name: str, scale: float) -> dict[str, Any]:
    """What a part found, with versions and seconds."""
    run, length = PARTS[name]
    bar = (TextColumn(f"{name:6}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # without a thread of its own: the soak forks
    with Progress(*bar, console=console, auto_refresh=False) as progress:
        task, drawn = progress.add_task(name, total=round(length * scale)), 0.0

        def report(done: int) -> None:
            nonlocal drawn
            if time.monotonic() - drawn > 0.5:
                drawn = time.monotonic()
                progress.update(task, completed=done, refresh=True)

        start = time.perf_counter()
        found = run(report, scale)
        seconds = round(time.perf_counter() - start)
        return {**about(), **found, "seconds": seconds}


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(PARTS)}.")] = None,
    scale: Annotated[float, typer.Option(help="Share of the full length.")] = 1.0,
    out: Annotated[Path, typer.Option(help="JSON, kept for parts not run.")] = RESULTS,
) -> None:
    """Runs the parts, all if none is named, and writes what they found."""
    torch.set_num_threads(1)
    unknown = set(parts or ()) - PARTS.keys()
    if unknown:
        raise typer.BadParameter(f"{sorted(unknown)}; choose of {', '.join(PARTS)}")
    if not parts and shutil.which("vllm") is None:
        parts = [name for name in PARTS if name != "vllm"]
        console.print("vllm is not on the PATH: that part is left out")
    for name in parts or PARTS:
        found = run_part(name, scale)
        results = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps({**results, name: found}, indent=1) + "\n")
        console.print_json(data=found)


if __name__ == "__main__":
    typer.run(main)
