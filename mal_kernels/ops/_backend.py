"""Which implementation serves a call. Nothing here falls back silently."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, BackendUnavailable

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
# each has a file for every op that it serves, with the same functions in it
FOLDERS = {"reference": "_torch", "cpu": "_cpu", "triton": "_triton", "cuda": "_cuda"}
CPU_OPS = (
    "memory_read",
    "memory_update",
    "neural_memory",
    "momentum_scan",
    "aligned_residual_read",
)
TRITON_OPS = (
    "memory_read",
    "memory_update",
    "neural_memory",
    "momentum_scan",
    "aligned_residual_read",
)
GRID = 65_535  # blocks along the second and third side of a grid
CUDA_OPS = ("momentum_scan", "memory_update", "neural_memory", "aligned_residual_read")


def measured() -> list[dict[str, Any]]:
    """GPU results that ``bench/gpu_session.sh`` wrote.

    In each a backend was right, and faster than the reference (CUDA: than Triton too), forward and,
    where it has one, backward: backend, op, dtype, features (of a head), tokens (of the whole
    call), architecture, and for people speedup, device, commit.
    """
    from ._measured import MEASURED  # read at first use; a trace sees a constant

    return MEASURED


def resolve(
    backend: str,
    op: str,
    device: torch.device,
    triton_limit: str | None = None,
    *,
    cuda_limit: str | None = None,
    cpu_limit: str | None = None,
    dtype: torch.dtype | None = None,
    features: int = 0,
    tokens: int = 0,
) -> tuple[str, str]:
    """The implementation that ``backend`` names for ``op``, and why it is that one.

    ``MAL_BACKEND`` overrides ``"auto"``, which is the reference, but on a CPU the native kernels,
    where there is a compiler or a library, and on a GPU the CUDA kernels, else Triton, where
    :func:`measured` holds a result of theirs on this architecture for the op, the dtype and a size
    like this one (:func:`covers`); all of them where they can serve the call.

    Args:
        backend: one of :data:`BACKENDS`.
        op: its name.
        device: of the tensors.
        triton_limit: why the Triton kernels cannot serve this call; None if they can.
        cuda_limit: the same of the CUDA kernels.
        cpu_limit: the same of the native CPU kernels.
        dtype: of the tokens; None: of calls of any size.
        features: of a head.
        tokens: of the whole call.

    Raises:
        ArgumentError: ``backend`` is not one of :data:`BACKENDS`.
        BackendUnavailable: an explicit backend cannot serve the call.
    """
    source = "backend"
    if backend == "auto":
        source, backend = "MAL_BACKEND", os.environ.get("MAL_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ArgumentError(f"{source}: got {backend!r}, expected one of {BACKENDS}")
    if backend == "auto" and device.type == "cpu":
        missing = _no_cpu(op, device) or cpu_limit
        return ("reference", missing) if missing else ("cpu", "the native kernels serve it")
    if backend == "auto":
        able = {
            "cuda": cuda_limit or _no_cuda(device),
            "triton": triton_limit or _no_triton(device),
        }
        usable = [name for name, limit in able.items() if limit is None]
        return _fastest(op, device, usable, dtype, features, tokens)
    if backend == "reference":
        return "reference", f"{source} is set"
    missing = f"this version has no {backend} kernel for {op}"
    if backend == "cpu":
        missing = _no_cpu(op, device) or cpu_limit
    if backend == "triton" and op in TRITON_OPS:
        missing = _no_triton(device) or triton_limit or _no_bfloat16(dtype)
    if backend == "cuda" and op in CUDA_OPS:
        missing = _no_cuda(device) or cuda_limit
    if missing:
        raise BackendUnavailable(
            f"{source}={backend!r}: {missing}; use backend='reference' (any device) or 'auto'"
        )
    return backend, f"{source} is set"


def _fastest(
    op: str,
    device: torch.device,
    usable: Sequence[str],
    dtype: torch.dtype | None,
    features: int,
    tokens: int,
) -> tuple[str, str]:
    """Returns what ``auto`` takes of the ``usable`` backends, the preferred one first; and why."""
    if device.type != "cuda":
        return "reference", f"no other backend runs on {device.type}"
    found = measured_on(op, device)
    for name in usable:
        near = [m for m in found if m["backend"] == name and covers(m, dtype, features, tokens)]
        if near:
            sizes = [f"{m['dtype']} {m['features']} features {m['tokens']} tokens" for m in near]
            return name, f"measured faster near {'; '.join(sizes)}; elsewhere reference"
    return "reference", "no committed GPU result shows a kernel to be faster for such a call"


def measured_on(op: str, device: torch.device) -> list[dict[str, Any]]:
    """The committed results of ``op`` on GPUs of the architecture of ``device``."""
    name = architecture(device)
    return [m for m in measured() if m["op"] == op and m["architecture"] == name]


def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` and the like."""
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(found.gcnArchName.split(":")[0])
    return f"sm_{found.major}{found.minor}"


def covers(result: dict[str, Any], dtype: torch.dtype | None, features: int, tokens: int) -> bool:
    """Whether a result speaks for a call.

    It does for calls in general (``dtype=None``), and for those of the same dtype, at most as many
    features and more than half, and a quarter to four times as many tokens.
    """
    return dtype is None or (
        str(dtype) == result["dtype"]
        and result["features"] < 2 * features <= 2 * result["features"]
        and result["tokens"] <= 4 * tokens <= 16 * result["tokens"]
    )


def _no_cpu(op: str, device: torch.device) -> str | None:
    """Says what keeps the native kernels from ``op``; the library is built if need be."""
    if op not in CPU_OPS:
        return f"this version has no native CPU kernel for {op}"
    if device.type != "cpu":
        return f"the native kernels run on CPUs and the tensors are on {device}"
    from .._cpu.library import missing

    return missing()


def _no_triton(device: torch.device) -> str | None:
    """Says what keeps Triton from running on ``device``."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; Linux only)"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"Triton runs on CUDA devices and the tensors are on {device}; "
        "to interpret the kernels on a CPU set TRITON_INTERPRET=1 before the first call"
    )


def _no_bfloat16(dtype: torch.dtype | None) -> str | None:
    """Says that Triton's own interpreter computes with the bits of a bfloat16 as an integer."""
    if dtype != torch.bfloat16 or os.environ.get("TRITON_INTERPRET") != "1":
        return None
    from triton.runtime.interpreter import InterpreterBuilder

    if getattr(InterpreterBuilder, "is_checked", False):
        return None
    return (
        "Triton's interpreter computes bfloat16 wrongly; "
        "call mal_kernels.testing.interpreter.install() first, which repairs it"
    )


def _no_cuda(device: torch.device) -> str | None:
    """Says what keeps the CUDA kernels from ``device``; a call finds or builds the library."""
    if device.type == "cuda" and not torch.version.hip:
        return None
    return f"the CUDA kernels run on NVIDIA GPUs and the tensors are on {device}"


def cpu_limit(weights: Sequence[Tensor], residual_norm: bool) -> str | None:
    """Why the native CPU kernels cannot serve a memory."""
    depth = len(weights) - residual_norm
    if weights[0].dtype == torch.float64:
        return "float64 is served by the reference alone"
    return None if depth <= 2 else f"the kernels serve memories of depth 1 and 2, not {depth}"


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
    return grid_limit(*weights[0].shape[:2])


def grid_limit(rows: int, heads: int) -> str | None:
    """Why a GPU's grid is too small for a call: rows and heads count along its short sides."""
    if max(rows, heads) > GRID:
        return f"a GPU's grid takes up to {GRID:,} rows and heads, not {rows:,} and {heads:,}"
    return None


def explain(op: str) -> tuple[str, str]:
    """Which backend ``auto`` uses for ``op`` on this machine, and the reason, for people.

    Example:
        >>> from mal_kernels.ops import explain
        >>> backend, why = explain("memory_read")
        >>> backend in ("reference", "cpu", "triton", "cuda")
        True
    """
    return resolve("auto", op, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def kernels(op: str, backend: str) -> Any:
    """The launchers of ``op``, in the file of its name in the folder of ``backend``."""
    return importlib.import_module(f"mal_kernels.{FOLDERS[backend]}.{op}")
