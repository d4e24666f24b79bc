"""Compiles ``csrc/`` into ``libmal_kernels.so``: nvcc, several files at a time through ninja.

Standard library only: ``setup.py`` uses this file where torch is absent.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .._native.build import (
    BuildError,
    cache_folder,
    content_hash,
    found_or_built,
    source_folder,
)

TARGETS = ("80", "90a", "100")  # compute capabilities; each also serves later minor ones
LIBRARY = "libmal_kernels.so"
FLAGS = ("-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden")
# nothing may spill or use local memory; for developers, another nvcc may spill a little
GATE = ("-Xptxas=-warn-spills,-warn-lmem-usage,-Werror",)


def target_of(capability: tuple[int, int]) -> str:
    """Returns the target of :data:`TARGETS` that serves a GPU of this compute capability.

    Example:
        >>> from mal_kernels._cuda.build import target_of
        >>> target_of((9, 0)), target_of((8, 6))
        ('90a', '80')
    """
    major, minor = capability
    for target in TARGETS:
        if target.rstrip("a") == f"{major}0" and (minor == 0 or not target.endswith("a")):
            return target
    raise BuildError(
        f"the GPU has compute capability {major}.{minor}; "
        f"the CUDA kernels are written for {', '.join(TARGETS)}"
    )


def sources() -> list[Path]:
    """The files that are compiled."""
    return sorted(source_folder().glob("*.cu"))


def find_nvcc() -> str:
    """nvcc of ``CUDA_HOME``, else on ``PATH``, else in ``/usr/local/cuda``."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home) / "bin" for home in homes if home]
    for path in (*map(str, places), None, "/usr/local/cuda/bin"):
        found = shutil.which("nvcc", path=path)
        if found:
            return found
    raise BuildError(
        "nvcc is not in CUDA_HOME, on PATH or in /usr/local/cuda; install the CUDA toolkit "
        "(12.8 or newer) or set CUDA_HOME"
    )


def find_ninja() -> str:
    """ninja on ``PATH`` or of the Python package."""
    beside_python = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    found = shutil.which("ninja", path=beside_python)
    if found:
        return found
    raise BuildError("ninja is not installed: pip install 'mal-kernels[cuda]'")


def cached(targets: Sequence[str]) -> Path:
    """The library for ``targets`` in the user's cache, built first if it is not there.

    It is kept by the content of the sources, the flags and the version of nvcc. Of several
    processes that want it at once, one builds and the others wait.
    """

    def built() -> Path:
        library = cache_folder() / "-".join([source_hash(), *targets]) / LIBRARY
        build(targets, library)
        return library

    return found_or_built(lambda: find_cached(targets), built, f"{source_hash()}.lock")


def find_cached(targets: Sequence[str]) -> Path | None:
    """A library in the user's cache that serves all of ``targets``."""
    for library in cache_folder().glob(f"{source_hash()}-*/{LIBRARY}"):
        if set(targets) <= set(library.parent.name.split("-")[1:]):
            return library
    return None


@functools.cache
def source_hash() -> str:
    """Hashes everything that decides what the library does."""
    return content_hash((p for p in source_folder().iterdir() if p.is_file()), _flags())


def build(targets: Sequence[str], library: Path, flags: Sequence[str] = ()) -> str:
    """Compiles and links ``library``; progress goes to standard error, the log is returned.

    Args:
        targets: of :data:`TARGETS`.
        library: where it shall be; it appears there only when it is complete.
        flags: more of them for nvcc, such as :data:`GATE`.

    Raises:
        BuildError: nvcc or ninja is missing, or a file does not compile; with the end of the log.
    """
    nvcc, ninja = find_nvcc(), find_ninja()
    library = library.resolve()
    library.parent.mkdir(parents=True, exist_ok=True)
    names = ", ".join(f"sm_{t}" for t in targets)
    print(f"mal_kernels: compiling the CUDA kernels for {names} with {nvcc}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        Path(scratch, "build.ninja").write_text(_plan(nvcc, targets, flags))
        failed, log = _run([ninja, "-C", scratch])
        if failed:
            kept = library.parent / "build.log"
            kept.write_text(log)
            end = "\n".join(log.splitlines()[-20:])
            raise BuildError(f"the CUDA kernels do not compile ({kept}):\n{end}")
        Path(scratch, LIBRARY).replace(library)
    return log


class Cost(NamedTuple):
    """A cost is what a thread of a kernel takes; stack and spills in bytes.

    Shared memory is not among it: all of it is asked for at the launch.
    """

    kernel: str
    target: str
    registers: int
    stack: int
    spills: int


def costs(log: str) -> list[Cost]:
    """Reads what ptxas says of every kernel off the log of a build with ``-Xptxas=-v``."""
    if filt := shutil.which("c++filt"):  # of binutils, which nvcc's host compiler needs
        log = subprocess.run([filt], input=log, check=True, capture_output=True, text=True).stdout
    found = re.findall(
        r"Compiling entry function '(.+?)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log.replace("(anonymous namespace)::", ""),
        re.DOTALL,
    )
    return [
        Cost(
            name.split("(")[0].removeprefix("void ").removeprefix("mal::"),
            *(target, int(registers), int(stack), int(stores) + int(loads)),
        )
        for name, target, stack, stores, loads, registers in found
    ]


def _flags() -> tuple[str, ...]:
    """Returns the flags of nvcc with those of ``MAL_NVCC_FLAGS`` (``-DMAL_MMA_SYNC``: no wgmma)."""
    return (*FLAGS, *os.environ.get("MAL_NVCC_FLAGS", "").split())


def architectures(targets: Sequence[str]) -> list[str]:
    """Flags of nvcc: machine code for each of ``targets``."""
    return [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]


def _plan(nvcc: str, targets: Sequence[str], flags: Sequence[str]) -> str:
    """A ninja file: an object of every source, and the library of all."""
    define = r"-DMAL_TARGETS=\"" + " ".join(targets) + r"\""
    options = " ".join([*_flags(), *architectures(targets), f"'{define}'", *flags])
    lines = [
        "rule compile",
        f"  command = {nvcc} {options} -c $in -o $out",
        "  description = $name",
        "rule link",
        f"  command = {nvcc} -shared -cudart=static $in -o $out",
        f"  description = {LIBRARY}",
    ]
    for source in sources():
        lines += [f"build {source.stem}.o: compile {_escaped(source)}", f"  name = {source.name}"]
    objects = " ".join(f"{source.stem}.o" for source in sources())
    lines += [f"build {LIBRARY}: link {objects}", ""]
    return "\n".join(lines)


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _run(command: list[str]) -> tuple[int, str]:
    """Shows progress line by line; returns the exit status and the whole output."""
    environment = os.environ | {"NINJA_STATUS": "  [%f/%t] "}
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("  ["):
                print(line, end="", file=sys.stderr, flush=True)
    return process.returncode, "".join(lines)
