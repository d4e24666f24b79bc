"""Runs a decoded kernel in the executor of ``csrc/ptx``, which g++ builds at its first use."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..._native.build import cache_folder, content_hash, found_or_built, source_folder
from .codes import OPS
from .decode import Decoder
from .source import Source

COMPILER = ("g++", "-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
WHEN = {"early": 0, "late": 1, "mixed": 2}
TOTALS = ("steps", "shared_loads", "shared_stores", "unfenced_copies", "tensor_flops")
TEXT_BYTES = 20_000

Argument = Tensor | int | bytes | None


class Fault(AssertionError):
    """A kernel did what a GPU would punish, or what is right by chance; a line for each report."""


class Schedule(NamedTuple):
    """One of the orders in which a GPU may do things.

    Attributes:
        when: copies and products are done ``early``, when they start, as ``late`` as they may be,
            or each by chance (``mixed``).
        seed: of the order of warps.
    """

    when: str = "late"
    seed: int = 0


LATE = Schedule()


class Geometry(NamedTuple):
    """A launch's sizes."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0  # dynamic bytes
    cluster: int = 1
    cooperative: bool = False


@dataclass(frozen=True)
class Outcome:
    """An outcome is what a launch executed, and what was found.

    Attributes:
        kernel: its name.
        geometry: of the launch.
        findings: a line each, with the place in the source where the PTX knows it.
        stopped: whether it could not go on.
        counts: warp instructions by operation of ``codes.inc``, and :data:`TOTALS`.
    """

    kernel: str
    geometry: Geometry
    findings: tuple[str, ...]
    stopped: bool
    counts: dict[str, int]

    def check(self) -> None:
        """Raises :class:`Fault` if anything was found."""
        if self.findings:
            lines = "\n  ".join(self.findings)
            raise Fault(f"{self.kernel}, grid {self.geometry.grid}:\n  {lines}")


class Kernel:
    """A kernel that can be run."""

    def __init__(self, text: str, name: str | None = None) -> None:
        self.source = Source.of(text, name)
        program = Decoder(self.source).decode()
        self.code = np.array(program.code, dtype=np.int32)
        self.operands = np.array(program.operands or [(0, 0)], dtype=np.int64)
        self.registers = len(program.registers) + 1

    def run(
        self,
        geometry: Geometry,
        arguments: Sequence[Argument],
        *,
        schedule: Schedule = LATE,
        buffers: Iterable[Tensor] = (),
        checks: bool = True,
    ) -> Outcome:
        """Runs one launch.

        Args:
            geometry: grid, block and shared memory.
            arguments: one for each parameter: tensors on the CPU, numbers, or a struct's bytes.
            schedule: the order of things.
            buffers: more tensors that the kernel may touch, besides those among the arguments.
            checks: without them only wrong addresses are found, and it is faster.
        """
        given = [a for a in arguments if isinstance(a, Tensor)]
        spans = np.array([*map(_span, {id(t): t for t in (*given, *buffers)}.values())] or [(0, 0)])
        spans = np.unique(spans.astype(np.uint64), axis=0)
        total = self.source.static_bytes + geometry.shared
        options: list[int] = [total, geometry.shared, geometry.cluster, geometry.cooperative]
        options += [checks, WHEN[schedule.when], schedule.seed]
        counts = np.zeros(len(OPS) + len(TOTALS), dtype=np.uint64)
        text = ctypes.create_string_buffer(TEXT_BYTES)
        parameters = self.packed(arguments)
        stopped = _library().ptx_run(
            *(_pointer(self.code), ctypes.c_int64(len(self.code))),
            *(_pointer(self.operands), ctypes.c_int64(len(self.operands))),
            ctypes.c_int64(self.registers),
            *(_pointer(np.array(x, dtype=np.uint32)) for x in (geometry.grid, geometry.block)),
            *(parameters, ctypes.c_int64(len(parameters))),
            _pointer(np.array(options, dtype=np.int64)),
            *(_pointer(spans), ctypes.c_int64(len(spans))),
            *(_pointer(counts), text, ctypes.c_int64(TEXT_BYTES)),
        )
        findings = tuple(self.placed(line) for line in text.value.decode().splitlines())
        named = dict(zip((*OPS, *TOTALS), counts.tolist(), strict=True))
        return Outcome(
            *(self.source.name, geometry, findings, bool(stopped)),
            {name: count for name, count in named.items() if count},
        )

    def packed(self, arguments: Sequence[Argument]) -> bytes:
        """The bytes of all parameters; those without an argument are zero."""
        packed = bytearray(self.source.parameter_bytes)
        # Triton appends two of its own
        for (offset, size), x in zip(self.source.parameters.values(), arguments, strict=False):
            packed[offset : offset + size] = _bytes(x, size)
        return bytes(packed)

    def placed(self, finding: str) -> str:
        """A finding with the places of the source for its lines of PTX."""

        def place(found: re.Match[str]) -> str:
            known = self.source.places.get(int(found[1]))
            return f"{found[0]} ({known})" if known else found[0]

        return re.sub(r"\bline (\d+)", place, finding)


def _bytes(x: Argument, size: int) -> bytes:
    if isinstance(x, bytes):
        return x
    number = x.data_ptr() if isinstance(x, Tensor) else int(x or 0)
    return number.to_bytes(size, "little", signed=number < 0)


def _span(x: Tensor) -> tuple[int, int]:
    """Where a tensor's own numbers lie: from its first to its last."""
    if not x.numel():
        return x.data_ptr(), 0
    reach = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), (reach + 1) * x.element_size()


def _pointer(x: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return x.ctypes.data_as(ctypes.c_void_p)


@functools.cache
def _library() -> ctypes.CDLL:
    """The executor, from the user's cache or built."""
    files = [f for f in (source_folder() / "ptx").iterdir() if f.suffix in (".cpp", ".h", ".inc")]
    key = content_hash(files, COMPILER)
    path = cache_folder() / f"ptx-{key}" / "libptx.so"

    def built() -> Path:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        sources = sorted(str(file) for file in files if file.suffix == ".cpp")
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch, path.name)
            subprocess.run([*COMPILER, *sources, "-o", str(made)], check=True)
            made.replace(path)
        return path

    return ctypes.CDLL(
        str(found_or_built(lambda: path if path.exists() else None, built, f"ptx-{key}.lock"))
    )
