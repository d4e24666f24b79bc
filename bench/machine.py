"""Where a result was obtained: the machine, what it can do at best, and the code that ran."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench import Result
from bench.interleaved import timed
from mal_kernels import __version__
from mal_kernels._torch.portable import flushes_denormals
from mal_kernels.cli import version

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "titans-pytorch")


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Inside, denormals are zero for everybody that is timed, as in our kernels.

    It begins before torch starts its threads, which keep the flag that they begin with.
    """
    before = flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def describe(threads: int) -> Result:
    """Processor, versions and commit."""
    cpuinfo = Path("/proc/cpuinfo")
    models = cpuinfo.read_text().split("model name\t: ")[1:] if cpuinfo.exists() else []
    return {
        "device": "cpu",
        "cpu": models[0].splitlines()[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "flushes_denormals": flushes_denormals(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {"mal-kernels": __version__} | {name: version(name) for name in PACKAGES},
        **code_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


@functools.cache
def rates() -> dict[str, float]:
    """Measures what this machine can do: matrix products and a copy that no cache holds.

    GFLOP/s of a ``[1024, 1024]`` product in float32 and bfloat16, and GB/s of a copy of 128 MB,
    counting what is read and what is written.
    """
    n, words = 1024, 2**25
    a, b = torch.randn(2, n, n)
    low_a, low_b = a.bfloat16(), b.bfloat16()
    source, target = torch.ones(words), torch.empty(words)
    found = timed(
        {
            "float32": lambda: a @ b,
            "bfloat16": lambda: low_a @ low_b,
            "copy": lambda: target.copy_(source),
        }
    )
    ms = {name: q["median"] for name, q in found.items()}
    return {
        "float32_gflop_per_s": 2 * n**3 / ms["float32"] / 1e6,
        "bfloat16_gflop_per_s": 2 * n**3 / ms["bfloat16"] / 1e6,
        "copy_gb_per_s": 8 * words / ms["copy"] / 1e6,
    }


def code_version() -> Result:
    """The commit that is measured, and whether its code has been changed since."""
    changes = _git("status", "--porcelain", "--", "mal_kernels", "csrc", "bench")
    return {"commit": _git("rev-parse", "HEAD"), "uncommitted_changes": bool(changes)}


def _git(*arguments: str) -> str | None:
    """Output of a git command; None where there is no repository or no commit yet."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def run_python(code: str) -> str:
    """Returns what a fresh interpreter prints."""
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
