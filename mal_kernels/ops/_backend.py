"""Which implementation serves a call. Nothing here falls back silently."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, BackendUnavailable

BACKENDS = ("auto", "reference", "triton", "cuda")
TRITON_OPS = (
    "memory_read",
    "memory_update",
    "neural_memory",
    "momentum_scan",
    "aligned_residual_read",
)


def resolve(backend: str, op: str, device: torch.device, triton_limit: str | None = None) -> str:
    """The implementation that ``backend`` names for ``op``; ``MAL_BACKEND`` overrides ``"auto"``.

    Args:
        backend: one of :data:`BACKENDS`.
        op: its name, for messages.
        device: of the tensors.
        triton_limit: why the Triton kernels cannot serve this call; None if they can.

    Raises:
        ArgumentError: ``backend`` is not one of :data:`BACKENDS`.
        BackendUnavailable: an explicit backend cannot serve the call.
    """
    source = "backend"
    if backend == "auto":
        source, backend = "MAL_BACKEND", os.environ.get("MAL_BACKEND", "reference")
    if backend not in BACKENDS:
        raise ArgumentError(f"{source}: got {backend!r}, expected one of {BACKENDS}")
    if backend not in ("triton", "cuda"):
        return "reference"
    missing: str | None = f"this version has no {backend} kernel for {op}"
    if backend == "triton" and op in TRITON_OPS:
        missing = _no_triton(device) or triton_limit
    if missing:
        raise BackendUnavailable(
            f"{source}={backend!r}: {missing}; use backend='reference' (any device) or 'auto'"
        )
    return backend


def _no_triton(device: torch.device) -> str | None:
    """What keeps Triton from running on ``device``."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; Linux only)"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"Triton runs on CUDA devices and the tensors are on {device}; "
        "to interpret the kernels on a CPU set TRITON_INTERPRET=1 before the first call"
    )


def memory_limit(
    dtype: torch.dtype, weights: Sequence[Tensor], residual_norm: bool, *, linear: int = 256
) -> str | None:
    """Why the Triton kernels cannot serve these weights; ``linear`` bounds D at depth 1."""
    depth, dim = len(weights) - residual_norm, weights[0].shape[2]
    if dtype == torch.float64 or weights[0].dtype == torch.float64:
        return "float64 is served by the reference alone"
    if depth > 2:
        return f"the kernels serve memories of depth 1 and 2, not {depth}"
    most = linear if depth == 1 else 128
    if dim > most:
        return f"at depth {depth} the kernels serve up to {most} features a head, not {dim}"
    return None


def explain(op: str) -> tuple[str, str]:
    """The backend ``auto`` uses for ``op`` and the reason, for people.

    Example:
        >>> from mal_kernels.ops import explain
        >>> explain("memory_read")[0]
        'reference'
    """
    backend = os.environ.get("MAL_BACKEND")
    if backend not in (None, "auto"):
        return backend, "MAL_BACKEND is set"
    if op in TRITON_OPS:
        return "reference", "no committed GPU result shows the Triton kernel to be faster"
    return "reference", "the only backend in this version"


def full_precision(device: torch.device) -> torch.autocast:
    """Keeps a surrounding autocast out of an op: state and accumulators stay float32."""
    return torch.autocast(device.type, enabled=False)


def fresh(x: Tensor) -> Tensor:
    """A contiguous copy: outputs alias nothing and have the strides that the fake promises."""
    return x.clone(memory_format=torch.contiguous_format)
