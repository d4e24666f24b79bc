"""Triton's launches, executed from the PTX that it compiles."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mal_kernels._triton import aot
from mal_kernels.ops import _backend

from .machine import LATE, Geometry, Kernel, Outcome, Schedule


class _Driver(aot._FakeDriver):
    """This driver's compiled kernels are kept apart from those that ptxas has seen."""

    def get_current_device(self) -> str:
        return f"ptx:{super().get_current_device()}"


@functools.cache
def _kernel(ptx: str) -> Kernel:
    return Kernel(ptx)


@contextlib.contextmanager
def executing(
    target: str, *, schedule: Schedule = LATE, checks: bool = True
) -> Iterator[list[Outcome]]:
    """Inside, ``backend="triton"`` serves the CPU by PTX for ``target``, such as ``sm_90``.

    What each launch did is added to the list.

    Raises:
        Fault: at the launch that committed it.
    """
    outcomes: list[Outcome] = []
    compile_kernel, stock_hash = JITFunction.run, CUDABackend.hash

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        binary = compile_kernel(self, *args, **kwargs | {"warmup": True})
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        grid = kwargs["grid"](given) if callable(kwargs["grid"]) else kwargs["grid"]
        signature = binary.src.signature
        values = [*_flat([signature[n] for n in self.arg_names], map(given.get, self.arg_names))]
        kernel = _kernel(binary.asm["ptx"])
        # scratch memory that the kernel does not want
        assert len(values) + 2 == len(kernel.source.parameters), kernel.source.name
        geometry = Geometry(
            (*grid, 1, 1)[:3], (32 * binary.metadata.num_warps, 1, 1), binary.metadata.shared
        )
        outcomes.append(kernel.run(geometry, values, schedule=schedule, checks=checks))
        outcomes[-1].check()

    active = driver._active
    driver.set_active(_Driver(aot.TARGETS[target]))
    try:
        with (
            mock.patch.object(_backend, "_no_triton", return_value=None),
            mock.patch.object(JITFunction, "run", run),
            # ptxas is not asked, and what it did not make is filed apart
            mock.patch.object(CUDABackend, "make_cubin", return_value=b"PTX alone"),
            mock.patch.object(CUDABackend, "hash", lambda self: f"PTX alone {stock_hash(self)}"),
        ):
            yield outcomes
    finally:
        driver._active = active


def _flat(types: Sequence[Any], values: Any) -> Iterator[Any]:
    """The values that are passed to a kernel: all but constants, those of tuples one by one."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple | list):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield value
