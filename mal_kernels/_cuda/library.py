"""Finds or builds ``libmal_kernels.so``, and calls it.

The library is bound by ctypes and knows neither torch nor Python, so one file serves all of their
versions; a call costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from .._native.build import BuildError
from .._native.packing import Fields, call, shapes
from ..errors import BackendUnavailable
from .build import LIBRARY, cached, target_of

# CUDA errors that say that this launch cannot be: an invalid value, too old a driver, no kernel
# image for the device, no room for the blocks of a cooperative launch, not supported, no room for
# the cluster
REFUSALS = {1, 35, 98, 200, 209, 720, 801, 912}


def launch(function: str, device: torch.device, **fields: Tensor | int | float | None) -> None:
    """Calls ``function`` of the library on the current stream of ``device``, without waiting.

    Args:
        function: its name in ``csrc/mal_kernels.h``.
        device: of all tensors.
        fields: those of the function's struct, in order, but for the stream.

    Raises:
        BackendUnavailable: there is no library for the device, or it refuses the launch.
        RuntimeError: the device has failed, now or at an earlier kernel.
    """
    library = load(torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        error = call(library, function, **fields, stream=stream)
    if error:
        reason = ctypes.string_at(library.mal_error(error)).decode()
        message = f"{function} on {device}: {reason} ({shapes(fields)})"
        if error in REFUSALS:
            raise BackendUnavailable(message)
        raise RuntimeError(
            f"{message}; CUDA error {error} is of the device, maybe of an earlier kernel: "
            "CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer names it, and only a new process recovers"
        )


def aligned(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if its rows could not be read 16 bytes at a time.

    A view into another tensor may begin anywhere; what an allocator gives is aligned.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def readable(fields: Fields) -> Fields:
    """The fields of what a kernel reads, each tensor :func:`aligned`."""
    return {name: aligned(x) if isinstance(x, Tensor) else x for name, x in fields.items()}


@functools.cache
def load(capability: tuple[int, int]) -> ctypes.CDLL:
    """The library for a GPU: the one of this installation, else of the user's cache, else built.

    Raises:
        BackendUnavailable: there is none and it cannot be built, or it does not run here.
    """
    if sys.platform != "linux":
        raise BackendUnavailable(f"the CUDA kernels run on Linux, not on {sys.platform}")
    try:
        target = target_of(capability)
        installed = Path(__file__).parent / LIBRARY
        if installed.exists():
            library = opened(installed)
            if target in ctypes.string_at(library.mal_targets()).decode().split():
                return check_driver(library)
        return check_driver(opened(cached([target])))
    except BuildError as error:
        raise BackendUnavailable(f"the CUDA kernels are not available: {error}") from error


def opened(path: Path) -> ctypes.CDLL:
    """The library at ``path``."""
    library = ctypes.CDLL(str(path))
    for name in ("mal_error", "mal_targets"):
        getattr(library, name).restype = ctypes.c_void_p
    return library


def check_driver(library: ctypes.CDLL) -> ctypes.CDLL:
    """Refuses a driver of an older major version of CUDA than the library was compiled with."""
    driver, needed = library.mal_driver_version(), library.mal_runtime_version()
    if driver // 1000 < needed // 1000:
        raise BackendUnavailable(
            f"the CUDA kernels were compiled with CUDA {needed // 1000} and the driver supports "
            f"{f'CUDA {driver // 1000}' if driver else 'none: no NVIDIA driver is loaded'}; update "
            "the driver, or build with an older toolkit (CUDA_HOME, python -m mal_kernels._cuda)"
        )
    return library
