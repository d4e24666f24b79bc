"""Finds or builds the library for this processor, and calls it."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from .._native.build import BuildError
from .._native.packing import BadValues, Fields, call
from .build import cached, library_name


def launch(function: str, fields: Fields) -> None:
    """Calls ``function`` of ``csrc/cpu/mal_cpu.h`` on as many threads as torch uses.

    Raises:
        MemoryError: scratch could not be had.
        BadValues: a gate or an index is out of bounds.
    """
    error = call(load(target()), function, **fields)
    if error:  # mal_cpu_error
        raise MemoryError(f"{function}: out of memory") if error == 1 else BadValues(function)


def missing() -> str | None:
    """Why there is no library for this processor; None if there is one, built now if need be."""
    return _missing(target())


# torch.compile takes the answer instead of tracing the question. The decorator for this,
# torch.compiler.assume_constant_result, sets the same and imports the compiler
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _missing(name: str) -> str | None:
    try:
        load(name)
    except BuildError as error:
        return str(error)
    return None


def target() -> str:
    """One of :data:`~mal_kernels._cpu.build.TARGETS`: what torch's own kernels use here."""
    known = {"AVX512": "avx512", "AVX2": "avx2"}
    return known.get(torch.backends.cpu.get_cpu_capability(), "portable")


_LOADED: set[str] = set()


def is_loaded() -> bool:
    """Whether this process has the library for this processor; asking does not load or build it."""
    return target() in _LOADED


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The library for a target: the one of this installation, else of the user's cache.

    Raises:
        BuildError: there is none and it cannot be built.
    """
    installed = Path(__file__).parent / library_name(name)
    try:
        found = ctypes.CDLL(str(installed if installed.exists() else cached(name)))
    except OSError as error:
        raise BuildError(f"the CPU kernels cannot be loaded: {error}") from error
    _LOADED.add(name)
    return found
