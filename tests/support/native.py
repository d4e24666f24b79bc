"""Other builds of the CPU kernels than the one of this processor: narrower, planted, sanitized."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from mal_kernels._cpu import library, neural_memory
from mal_kernels._cpu.build import find_compiler
from mal_kernels._native.build import source_folder
from mal_kernels.testing.emulation import in_program

FLAGS = ["-std=c++17", "-O0", "-g", "-fPIC", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def needs_library() -> None:
    """Skips the calling test module where the CPU kernels cannot be had."""
    if reason := library.missing():
        pytest.skip(reason, allow_module_level=True)


def compiled(folder: Path, *flags: str, bug: tuple[str, str] | None = None) -> Path:
    """A library, or with :data:`SANITIZERS` a program that replays one call.

    ``bug`` is text that stands once in ``csrc/cpu`` and what to put there.
    """
    csrc = source_folder()
    text = "".join(path.read_text() for path in sorted((csrc / "cpu").iterdir()))
    if bug:
        assert text.count(bug[0]) == 1, f"not once: {bug[0]!r}"
        for path in (csrc / "cpu").iterdir():
            folder.joinpath("cpu").mkdir(exist_ok=True)
            (folder / "cpu" / path.name).write_text(path.read_text().replace(*bug))
        (folder / "mal_kernels.h").write_text((csrc / "mal_kernels.h").read_text())
    source = (folder if bug else csrc) / "cpu/library.cpp"
    if SANITIZERS[0] in flags:
        kind = [str(csrc / "emu/replay.cpp"), "-rdynamic", "-ldl"]
    else:
        kind = ["-shared"]
    out = folder / "build"
    subprocess.run(
        [find_compiler(), *FLAGS, *flags, str(source), *kind, "-o", str(out)], check=True
    )
    return out


def serve(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """From here on ``backend="cpu"`` is served by the library at ``path``."""
    found = ctypes.CDLL(os.fspath(path))
    monkeypatch.setattr(library, "load", lambda _: found)


def serve_program(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """The same by a program, each call in a process of its own."""
    run = in_program(path)
    monkeypatch.setattr(neural_memory, "launch", lambda name, fields: run(name, None, **fields))
