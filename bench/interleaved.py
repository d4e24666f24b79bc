"""How anything is measured here: clocks, turns, quantiles, peaks, and what the machine is."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mal_kernels import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "titans-pytorch", "flash-linear-attention")
Functions = Mapping[str, Callable[[], object]]
Quantiles = dict[str, float]


def wall_clock_ms(function: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def quantiles(values: Sequence[float]) -> Quantiles:
    """20 %, 50 % and 80 %."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "median", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "median": cuts[4], "p80": cuts[7]}


def in_turns(
    functions: Functions,
    *,
    seconds: float = 1.0,
    rounds: int = 5,
    most: int = 20,
    once: Callable[[Callable[[], object]], float] = wall_clock_ms,
) -> dict[str, Quantiles]:
    """Quantiles of every function, which take turns so that a busy moment meets them all alike.

    Args:
        functions: what to call, by name.
        seconds: per function for all rounds together; a fast one is called several times a round.
            A slow one that has used four times that leaves after its third round.
        rounds: in which each function has its turn, after one call to warm up.
        most: calls of a function in a round.
        once: milliseconds of one call.

    Returns:
        Per function ``p20``, ``median`` and ``p80`` in milliseconds, and the number of ``calls``.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        once(function)
    for number in range(rounds):
        for name, function in functions.items():
            mine = samples[name]
            if number >= 3 and sum(mine) > 4e3 * seconds:
                continue
            spent = 0.0
            for _ in range(most):
                mine.append(once(function))
                spent += mine[-1]
                if spent >= 1e3 * seconds / rounds:
                    break
    return {name: quantiles(ms) | {"calls": len(ms)} for name, ms in samples.items()}


def in_pairs(
    base: Callable[[], object], other: Callable[[], object], rounds: int
) -> dict[str, Quantiles]:
    """Two functions side by side, and what ``other`` takes longer within a pair.

    Small differences need pairs: what the machine does besides moves both calls alike.
    """
    pairs = []
    for number in range(rounds + 2):
        first, second = (base, other) if number % 2 else (other, base)
        pair = wall_clock_ms(first), wall_clock_ms(second)
        pairs.append(pair if number % 2 else pair[::-1])
    a, b = zip(*pairs[2:], strict=True)
    added = [y - x for x, y in pairs[2:]]
    return {"base": quantiles(a), "other": quantiles(b), "added": quantiles(added)}


# --- the device ---------------------------------------------------------------------------------


def device_rates(seconds: float = 1.0) -> dict[str, float]:
    """What this machine can do, measured: matrix products and a copy that no cache holds.

    GFLOP/s of a ``[1024, 1024]`` product in float32 and bfloat16, and GB/s of a copy of 128 MB,
    counting what is read and what is written.
    """
    n, words = 1024, 2**25
    a, b = torch.randn(2, n, n)
    low_a, low_b = a.bfloat16(), b.bfloat16()
    source, target = torch.ones(words), torch.empty(words)
    functions: Functions = {
        "float32": lambda: a @ b,
        "bfloat16": lambda: low_a @ low_b,
        "copy": lambda: target.copy_(source),
    }
    ms = {name: q["median"] for name, q in in_turns(functions, seconds=seconds).items()}
    flops = {name: 2 * n**3 / ms[name] / 1e6 for name in ("float32", "bfloat16")}
    return {
        "float32_gflop_per_s": flops["float32"],
        "bfloat16_gflop_per_s": flops["bfloat16"],
        "copy_gb_per_s": 8 * words / ms["copy"] / 1e6,
    }


def describe_machine(threads: int) -> dict[str, Any]:
    """Where and with what a result was obtained."""
    cpuinfo = Path("/proc/cpuinfo")
    models = cpuinfo.read_text().split("model name\t: ")[1:] if cpuinfo.exists() else []
    return {
        "device": "cpu",
        "cpu": models[0].splitlines()[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {"mal-kernels": __version__} | {name: version(name) for name in PACKAGES},
        **code_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def version(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """Output of a git command; None where there is no repository or no commit yet."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def code_version() -> dict[str, Any]:
    """What is measured: the commit, and whether its code has been changed since."""
    changes = git("status", "--porcelain", "--", "mal_kernels", "csrc", "bench")
    return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(changes)}


# --- fresh processes ----------------------------------------------------------------------------


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{code!r} failed:\n{done.stderr}")
    return done.stdout


def peak_rss() -> int:
    """Bytes of this process at its peak so far, on Linux.

    Not getrusage: its ru_maxrss starts at the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
