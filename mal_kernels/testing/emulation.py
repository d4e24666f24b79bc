"""Runs the CUDA kernels of ``csrc/`` on the host, through the ops, with g++ alone.

:func:`library` is all of them with the interface of ``libmal_kernels.so``. :func:`program` is one
source built with a sanitizer, and with a planted bug if asked for. :func:`serve` lets
``backend="cuda"`` run on either for tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mal_kernels._cuda import aligned_residual_read
from mal_kernels._cuda import library as cuda
from mal_kernels._cuda.build import sources
from mal_kernels._native import packing
from mal_kernels._native.build import BuildError, source_folder
from mal_kernels.ops import _backend

COMPILER = ["g++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-DMAL_EMULATE"]
COMPILER += ["-Wno-unknown-pragmas", "-Wno-missing-field-initializers"]
# what the op calls besides a kernel; linked with it, but not watched
RUNS_FIRST = {
    "write_bwd.cu": ["neural_memory_fwd.cu"],
    "causal_read_bwd.cu": ["neural_memory_fwd.cu", "write_bwd.cu"],
}
# the first report is enough; short histories, as a thread does little between two barriers
OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1:history_size=2", "ASAN_OPTIONS": "detect_leaks=0"}

Launch = Callable[..., None]


class Refused(Exception):
    """A sanitizer or the emulation itself found a fault; its report."""


def needs_compiler() -> None:
    """Skips the calling test module where the kernels cannot be emulated."""
    if shutil.which("g++") is None:
        pytest.skip(
            "g++ is not installed: the CUDA kernels are not emulated", allow_module_level=True
        )


def is_found(*programs: Callable[[], str]) -> bool:
    """Whether all of what builds the library is here, such as ``build.find_nvcc``."""
    try:
        return all(find() for find in programs)
    except BuildError:
        return False


def compiled(source: Path, out: Path, *flags: str) -> Path:
    """An object file."""
    subprocess.run([*COMPILER, *flags, "-c", "-x", "c++", str(source), "-o", str(out)], check=True)
    return out


def library(folder: Path, *names: str) -> ctypes.CDLL:
    """The kernels of these files of ``csrc/``, by default of all, emulated."""
    wanted = {*names, "library.cu"} if names else {s.name for s in sources()}
    return cuda.opened(linked(folder, [s for s in sources() if s.name in wanted]))


def linked(folder: Path, files: Sequence[Path], csrc: Path | None = None) -> Path:
    """A library of ``files``, emulated by what stands in ``csrc``."""
    csrc = csrc or source_folder()
    objects = [
        compiled(f, folder / f"{f.name}.o", "-fPIC", f"-I{csrc}")
        for f in (*files, csrc / "emu/emulation.cpp")
    ]
    out = folder / "libemulated.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(out)], check=True)
    return out


def program(
    folder: Path, source: str, sanitizer: str, *flags: str, bug: tuple[str, str] | None = None
) -> Path:
    """``source`` of ``csrc/`` with a main that replays one call.

    Args:
        folder: for what is built; what is there already is used.
        source: such as ``momentum_scan.cu``.
        sanitizer: ``thread`` or ``address``.
        flags: more of them for the compiler.
        bug: text that stands once in the source or in a header of kernels, and what to put there.
    """
    csrc = source_folder()
    runtime = folder / "emulation.o"
    if not runtime.exists():
        compiled(csrc / "emu/emulation.cpp", runtime)
    flag, code = f"-fsanitize={sanitizer}", csrc / source
    out = folder / "_".join([code.stem, sanitizer, *flags, *(["planted"] if bug else [])])
    if out.exists() and not bug:
        return out
    replay = folder / f"replay_{sanitizer}.o"
    if not replay.exists():
        compiled(csrc / "emu/replay.cpp", replay, flag)
    if bug:
        texts = {path: path.read_text() for path in (code, *csrc.glob("*.cuh"))}
        where = [path for path, text in texts.items() if text.count(bug[0])]
        assert [texts[p].count(bug[0]) for p in where] == [1], f"not once: {bug[0]!r}"
        planted = folder / "planted"
        shutil.copytree(csrc, planted, dirs_exist_ok=True)
        (planted / where[0].name).write_text(texts[where[0]].replace(*bug))
        code = planted / source
    kernel = compiled(code, Path(f"{out}.o"), flag, *flags, "-O0", f"-I{csrc}")
    others = [folder / f"{name}.o" for name in RUNS_FIRST.get(source, ())]
    for other in others:
        if not other.exists():
            compiled(csrc / other.stem, other)
    objects = map(str, (kernel, replay, runtime, *others))
    subprocess.run(["g++", flag, "-rdynamic", *objects, "-o", str(out)], check=True)
    return out


def serve(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    """From here on ``backend="cuda"`` serves the CPU by ``launch``."""
    monkeypatch.setattr(_backend, "_no_cuda", lambda _: None)
    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(aligned_residual_read, "multiprocessors", lambda _: 2)


def devices(*names: str) -> Callable[..., torch.device]:
    """The fixture ``device`` of a test module: where its kernels run.

    On the CPU those of :func:`library` run, built when first wanted.
    """
    emulated: list[ctypes.CDLL] = []

    @pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def device(request, monkeypatch, tmp_path_factory):
        if request.param == "cpu":
            needs_compiler()
            if not emulated:
                emulated.append(library(tmp_path_factory.mktemp("emulated"), *names))
            serve(monkeypatch, in_process(emulated[0]))
        return torch.device(request.param)

    return device


def in_process(emulated: ctypes.CDLL) -> Launch:
    """Calls of the emulated library."""

    def launch(function: str, device: torch.device, **fields: Tensor | int | float | None) -> None:
        error = packing.call(emulated, function, **fields, stream=0)
        assert error == 0, f"{function}: error {error}"

    return launch


def in_program(path: Path) -> Launch:
    """Calls of a program of :func:`program`, each in a process of its own."""

    def launch(function: str, device: torch.device, **fields: Tensor | int | float | None) -> None:
        record, places = [struct.pack("=q", len(fields) + 1)], []
        for x in (*fields.values(), 0):  # the last is the stream
            if isinstance(x, Tensor):
                places.append((x, sum(map(len, record)) + 16))
                record.append(struct.pack("=qq", 1, x.numel() * x.element_size()))
                record.append(as_bytes(x).numpy().tobytes())
            else:
                record.append(struct.pack("=q", 0) + packing.word(x))
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(record))
            file.flush()
            command = ["setarch", "-R", str(path), function, file.name]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | OPTIONS)
            if done.returncode:
                raise Refused(done.stderr or f"{function}: error {done.returncode}")
            result = Path(file.name).read_bytes()
        for x, place in places:
            raw = as_bytes(x)
            raw.copy_(torch.frombuffer(bytearray(result), dtype=torch.uint8)[place:][: len(raw)])

    return launch


def as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    assert x.is_contiguous()
    return x.detach().view(-1).view(torch.uint8)
