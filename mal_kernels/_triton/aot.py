"""Compiles every kernel for a GPU that is not there, and reads its cost off the machine code.

The ``EXAMPLES`` of a kernel file call its launchers on meta tensors. Here a launch is a
compilation: what the launcher would specialise and how. A launcher that reads a value on the host
fails, because meta tensors have none. Registers, spills and shared memory are those of the very
binary that Triton would load (``cuobjdump`` comes with Triton); for AMD they stand in the assembly.
Not with ``TRITON_INTERPRET=1``, which is read when a kernel is decorated.

``python -m mal_kernels._triton.aot [sm_90]`` prints the table of every kind of size that may be
chosen (some twenty minutes on one core); ``mal-kernels doctor --kernels`` that of a few.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


@dataclass(frozen=True)
class Report:
    """One kernel at one size on one target.

    ``spills`` counts instructions that store to or load from local memory, ``mma`` the tensor-core
    instructions, ``narrow_dots`` the 16-bit matrix products of the source, ``int32_offsets`` the
    pointer arguments to which a 32-bit offset is added first, ``rewritten`` what
    :func:`rewritten_operands` finds.
    """

    kernel: str
    example: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int
    mma: int
    narrow_dots: int
    int32_offsets: tuple[str, ...]
    rewritten: tuple[str, ...]


class _FakeDriver:
    """This driver knows as much as a compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend}:{self._target.arch}"  # a key of JITFunction.device_caches

    def get_current_stream(self, device: str | None = None) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Inside, a launch compiles for ``target`` and adds (kernel, binary) to the list."""
    launched: list[tuple[str, Any]] = []
    run_kernel, active = JITFunction.run, driver._active

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        binary = run_kernel(self, *args, **kwargs | {"warmup": True})
        launched.append((self.__name__, binary))

    JITFunction.run = run
    driver.set_active(_FakeDriver(TARGETS[target]))
    try:
        yield launched
    finally:
        JITFunction.run = run_kernel
        driver._active = active


def kernel_modules() -> dict[str, ModuleType]:
    """The files of this version that define or launch kernels, by name."""
    package = importlib.import_module(__package__)
    names = (info.name for info in pkgutil.iter_modules(package.__path__))
    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in names}
    return {n: m for n, m in modules.items() if kernels_of(m) or hasattr(m, "EXAMPLES")}


def kernels_of(module: ModuleType) -> set[str]:
    """Names of the kernels that ``module`` defines."""
    own = (f for f in vars(module).values() if isinstance(f, JITFunction))
    names = (f.__name__ for f in own if f.__module__ == module.__name__)
    return {name for name in names if name.endswith("_kernel")}


def reports(
    module: ModuleType | SimpleNamespace, target: str, *, at_most: int | None = None
) -> list[Report]:
    """Every launch of the module's first ``at_most`` ``EXAMPLES``, each binary once."""
    found: dict[str, Report] = {}
    for example in [*getattr(module, "EXAMPLES", ())][:at_most]:
        with compiling_for(target) as launched:
            module.EXAMPLES[example]()
        for kernel, binary in launched:
            if binary.hash not in found:
                found[binary.hash] = _report(kernel, example, target, binary)
    return [*found.values()]


def sweep(target: str) -> Iterator[Report]:
    """:func:`reports` of every module's ``SWEEP``, or of its ``EXAMPLES`` if it has none."""
    for module in kernel_modules().values():
        examples = getattr(module, "SWEEP", getattr(module, "EXAMPLES", {}))
        for name, launch in examples.items():
            yield from reports(SimpleNamespace(EXAMPLES={name: launch}), target)


def _report(kernel: str, example: str, target: str, binary: Any) -> Report:
    read = _read_hip if target.startswith("gfx") else _read_cuda
    registers, spills, mma, *rewritten = read(binary.asm)
    ir, made = binary.asm["ttir"], binary.metadata
    return Report(
        *(kernel, example, target, made.num_warps, registers, spills, made.shared, mma),
        narrow_dots=len(re.findall(r"tt\.dot .*: tensor<[0-9x]+x(?:bf16|f16)>", ir)),
        int32_offsets=tuple(_int32_offsets(ir)),
        rewritten=tuple(rewritten),
    )


def _read_cuda(asm: dict[str, Any]) -> tuple[Any, ...]:
    """Registers, spills and tensor-core instructions of a cubin, and :func:`rewritten_operands`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = sass_of(Path(file.name))
    registers = max(map(int, re.findall(r"\bREG:(\d+)", text)))
    spills = len(re.findall(r"\s(?:STL|LDL)[.\s]", text))
    mma = len(re.findall(r"\s(?:HMMA|HGMMA|UTC\w*MMA)[.\s]", text))
    return registers, spills, mma, *rewritten_operands(text)


def rewritten_operands(sass: str) -> Iterator[str]:
    """Instructions that write a register which a ``wgmma`` under way may still read.

    Its operand A may stand in registers, and is read until the next ``WARPGROUP.DEPBAR``; ptxas
    before 13.3 may give them away before.
    """
    in_use: set[int] = set()
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", sass):
        operation, _, rest = re.sub(r"^@!?U?P[T\d]+\s+", "", line).partition(" ")
        if operation.startswith("HGMMA"):
            a = re.match(r"\s*R\d+,\s*R(\d+)", rest)
            in_use |= set(range(int(a[1]), int(a[1]) + 4)) if a else set()
        elif operation.startswith("WARPGROUP.DEPBAR"):
            in_use = set()
        elif in_use and not re.match(r"ST|RED|LDGSTS|BAR|\w*SETP", operation):
            first = re.match(r"\s*(?:PT,\s*|P\d,\s*)?R(\d+)\b", rest)
            is_quad = re.search(r"\.128|LDSM.*\.4", operation)
            is_pair = re.search(r"\.64|LDSM|WIDE|CS2R", operation)
            wide = 4 if is_quad else 2 if is_pair else 1
            if first and in_use & set(range(int(first[1]), int(first[1]) + wide)):
                yield line


def sass_of(binary: Path, *options: str) -> str:
    """The machine code and resources of a file, by the ``cuobjdump`` that comes with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # cuobjdump looks for nvdisasm on the path
    environment = dict(os.environ, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    command = [tools / "cuobjdump", "-res-usage", "-sass", *options, binary]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def _read_hip(asm: dict[str, Any]) -> tuple[int, int, int]:
    text = asm["amdgcn"]
    registers, *spills = (
        max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    return registers, sum(spills), text.count("v_mfma")


def _int32_offsets(ir: str) -> Iterator[str]:
    """Pointer arguments to which the first offset added has 32 bits, so that a large one wraps."""
    arguments = re.search(r"tt\.func public @\w+\((.*)", ir)
    pointers = dict.fromkeys(re.findall(r"(%[\w.]+): !tt\.ptr", arguments[1] if arguments else ""))
    names = {p: p for p in pointers}
    for line in ir.splitlines():
        if splat := re.search(r"(%[\w.]+) = tt\.splat (%[\w.]+) : !tt\.ptr", line):
            if splat[2] in names:
                names[splat[1]] = names[splat[2]]
        elif add := re.search(r"tt\.addptr (%[\w.]+), .*i32>? ", line):
            if add[1] in names:
                yield names[add[1]].strip("%")


if __name__ == "__main__":
    for row in sweep(*(sys.argv[1:] or ["sm_90"])):
        print(
            f"{row.kernel:28} {row.example:40} {row.warps:2} warps {row.registers:3} registers "
            f"{row.spills:4} spills {row.shared:6} B shared {row.mma:4} mma",
            flush=True,
        )
