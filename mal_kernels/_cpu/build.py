"""Compiles ``csrc/cpu/`` for an instruction set: g++ or clang++, in seconds.

Standard library only: ``setup.py`` uses this file where torch is absent.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .._native.build import BuildError, cache_folder, content_hash, found_or_built, source_folder

FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno"),
)
# x86-64-v3 and -v4 in words that older compilers know; portable is 16 bytes a vector: SSE2, NEON
TARGETS = {
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
        *("-mbmi2", "-mprefer-vector-width=512"),
    ),
    "avx2": ("-mavx2", "-mfma", "-mbmi2"),
    "portable": (),
}


def targets_of(machine: str) -> list[str]:
    """Returns the :data:`TARGETS` that ``platform.machine()`` may run."""
    return [*TARGETS] if machine in ("x86_64", "AMD64") else ["portable"]


def library_name(target: str) -> str:
    """The file for one of :data:`TARGETS`."""
    return f"libmal_cpu_{target}.so"


def find_compiler() -> str:
    """``CXX``, else g++ or clang++ on ``PATH``."""
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(f"the CPU kernels are built on Linux and macOS, not on {sys.platform}")
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("there is no C++ compiler: install g++ or clang++, or set CXX")


def cached(target: str) -> Path:
    """The library for ``target`` in the user's cache, built first if it is not there."""
    found = cache_folder() / source_hash() / library_name(target)

    def built() -> Path:
        build(target, found)
        return found

    lock = f"{source_hash()}-{target}.lock"
    return found_or_built(lambda: found if found.exists() else None, built, lock)


@functools.cache
def source_hash() -> str:
    """Hashes everything that decides what the libraries do."""
    csrc = source_folder()
    files = [*csrc.glob("mal_*.h"), *(csrc / "cpu").iterdir()]
    return content_hash(files, FLAGS, TARGETS, find_compiler())


def build(target: str, library: Path) -> None:
    """Compiles ``library``; it appears there only when it is complete.

    Without OpenMP, which clang++ may lack, it runs on one thread.

    Raises:
        BuildError: there is no compiler, or it fails; with the end of what it said.
    """
    compiler = find_compiler()
    print(f"mal_kernels: compiling the CPU kernels ({target}) with {compiler}", file=sys.stderr)
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [compiler, *FLAGS, *TARGETS[target], str(source_folder() / "cpu/library.cpp")]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch, library.name)
        for openmp in (["-fopenmp"], []):
            done = subprocess.run(
                [*command, *openmp, "-o", str(made)], capture_output=True, text=True
            )
            if done.returncode == 0:
                made.chmod(0o700)
                made.replace(library)
                return
    end = "\n".join(done.stderr.splitlines()[-20:])
    raise BuildError(f"{compiler} does not compile the CPU kernels:\n{end}")
