"""The launches of ``csrc/``, executed from the PTX that nvcc makes for sm_90a.

A source is compiled with its host code, so that grids, clusters and shared memory are those that
it asks for; ``csrc/ptx/cudart.cu`` stands for the runtime and refuses what a driver would.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mal_kernels._cuda import aligned_residual_read, library
from mal_kernels._cuda.build import FLAGS, find_nvcc
from mal_kernels._native import packing
from mal_kernels.errors import BackendUnavailable
from mal_kernels.ops import _backend

from ..._native.build import cache_folder, content_hash, found_or_built, source_folder
from .machine import LATE, Geometry, Kernel, Outcome, Schedule

TARGET = "-gencode=arch=compute_90a,code=compute_90a"  # PTX alone: ptxas isn't asked
SOURCES = {
    "mal_momentum_scan_fwd": "momentum_scan.cu",
    "mal_momentum_scan_bwd": "momentum_scan.cu",
    "mal_neural_memory_fwd": "neural_memory_fwd.cu",
    "mal_causal_read_bwd": "causal_read_bwd.cu",
    "mal_write_bwd": "write_bwd.cu",
    "mal_aligned_residual_read": "aligned_residual_read.cu",
}
# Reads of shared memory that nothing wrote, whose values are not used: rows of tokens that a tile
# does not have, and the word that nvcc loads with β, f and ε.
EXPLAINED = re.compile(
    r"\((?:causal_read\.cuh|(?:neural_memory_fwd|write_bwd)\.cu):\d+\): "
    "shared memory is read before it is written"
)
BLOCKS = 3  # of a cooperative launch: as if a GPU had so many multiprocessors

Launched = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint * 9), ctypes.c_void_p
)


@functools.cache
def compiled(source: str) -> Path:
    """The folder with ``host.so`` and ``kernels.ptx`` of a file of ``csrc/``, cached."""
    csrc, nvcc = source_folder(), find_nvcc()
    release = subprocess.run([nvcc, "--version"], check=True, capture_output=True).stdout
    headers = [path for path in csrc.iterdir() if path.suffix in (".h", ".cuh")]
    runtime = csrc / "ptx/cudart.cu"
    key = content_hash([csrc / source, runtime, *headers], FLAGS, TARGET, release)
    folder = cache_folder() / f"ptx-{key}"

    def built() -> Path:
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            made = Path(scratch, "made")
            made.mkdir(mode=0o700)
            command = [nvcc, *FLAGS, TARGET, "-shared", "-cudart=none", "--keep", "--keep-dir"]
            files = [scratch, str(csrc / source), str(runtime), "-o", str(made / "host.so")]
            subprocess.run([*command, *files], check=True, cwd=scratch)
            Path(scratch, f"{Path(source).stem}.ptx").rename(made / "kernels.ptx")
            made.rename(folder)
        return folder

    return found_or_built(lambda: folder if folder.exists() else None, built, f"{folder.name}.lock")


@functools.lru_cache(maxsize=64)
def _kernel(path: Path, name: str, edit: Callable[[str], str] | None) -> Kernel:
    text = path.read_text()
    start = text.index(f".entry {name}")
    rest = text.find(".entry ", start + 1)
    end = len(text) if rest < 0 else text.rindex("\n}", start, rest) + 2
    body = text[start:end]
    head = text[: text.index(".entry ")]
    # places in the source stand at the end of the file
    before = "\n" * text[len(head) : start].count("\n")
    return Kernel(head + before + (edit(body) if edit else body) + text[end:], name)


@contextlib.contextmanager
def executing(
    *,
    schedule: Schedule = LATE,
    checks: bool = True,
    edit: Callable[[str], str] | None = None,
    room: int = 1,
) -> Iterator[list[Outcome]]:
    """Inside, ``backend="cuda"`` serves the CPU by PTX; what each launch did is in the list.

    Args:
        schedule: the order of things.
        checks: as of :meth:`.machine.Kernel.run`.
        edit: of the text of every kernel before it is decoded, to plant a fault.
        room: how many clusters of more than 8 blocks the GPU would have at once.

    Raises:
        Fault: at the launch that committed it.
    """
    outcomes: list[Outcome] = []

    def launch(function: str, device: torch.device, **fields: Tensor | int | float | None) -> None:
        folder = compiled(SOURCES[function])
        tensors = [x for x in fields.values() if isinstance(x, Tensor)]
        launches: list[tuple[Kernel, Geometry, bytes]] = []

        def launched(name: bytes, sizes: Any, arguments: int) -> None:
            *dims, shared, cluster, cooperative = sizes.contents
            grid, block = (*dims[:3],), (*dims[3:],)
            geometry = Geometry(grid, block, shared, cluster, bool(cooperative))
            kernel = _kernel(folder / "kernels.ptx", name.decode(), edit)
            given = ctypes.string_at(arguments, kernel.source.parameter_bytes)
            launches.append((kernel, geometry, given))

        host = ctypes.CDLL(str(folder / "host.so"))
        handler = Launched(launched)
        host.ptx_on_launch(handler)
        host.ptx_set_room(room)
        if error := packing.call(host, function, **fields, stream=0):
            raise BackendUnavailable(f"{function}: the launch is refused, error {error}")
        for kernel, geometry, given in launches:
            outcome = kernel.run(
                geometry, [given], schedule=schedule, buffers=tensors, checks=checks
            )
            found = tuple(line for line in outcome.findings if not EXPLAINED.search(line))
            outcomes.append(replace(outcome, findings=found))
            outcomes[-1].check()

    with (
        mock.patch.object(_backend, "_no_cuda", return_value=None),
        mock.patch.object(library, "launch", launch),
        mock.patch.object(aligned_residual_read, "multiprocessors", return_value=BLOCKS),
    ):
        yield outcomes
