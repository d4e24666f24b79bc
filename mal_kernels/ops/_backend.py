"""Which implementation serves a call. Nothing here falls back silently."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..errors import ArgumentError, BackendUnavailable

BACKENDS = ("auto", "reference", "triton", "cuda")


def resolve(backend: str, op: str) -> str:
    """The implementation that ``backend`` names for ``op``; ``MAL_BACKEND`` overrides ``"auto"``.

    Raises:
        ArgumentError: ``backend`` is not one of :data:`BACKENDS`.
        BackendUnavailable: an explicit backend has no kernel for ``op``.
    """
    source = "backend"
    if backend == "auto":
        source, backend = "MAL_BACKEND", os.environ.get("MAL_BACKEND", "reference")
    if backend not in BACKENDS:
        raise ArgumentError(f"{source}: got {backend!r}, expected one of {BACKENDS}")
    if backend in ("triton", "cuda"):
        raise BackendUnavailable(
            f"{source}={backend!r}: this version has no {backend} kernel for {op}; "
            "use backend='reference' (any device) or 'auto'"
        )
    return "reference"


def explain(op: str) -> tuple[str, str]:
    """The backend ``auto`` uses for ``op`` and the reason, for people.

    Example:
        >>> from mal_kernels.ops import explain
        >>> explain("memory_read")[0]
        'reference'
    """
    if "MAL_BACKEND" in os.environ:
        return resolve("auto", op), "MAL_BACKEND is set"
    return resolve("auto", op), "the only backend in this version"


def full_precision(device: torch.device) -> torch.autocast:
    """Keeps a surrounding autocast out of an op: state and accumulators stay float32."""
    return torch.autocast(device.type, enabled=False)


def fresh(x: Tensor) -> Tensor:
    """A contiguous copy: outputs alias nothing and have the strides that the fake promises."""
    return x.clone(memory_format=torch.contiguous_format)
