"""The recurrence of momentum and decay alone, for updates that somebody else computed.

``S_t = η_t S_{t−1} + u_t``, ``W_t = (1 − α_t) W_{t−1} + S_t``: two associative scans. Per element
of ``u`` four flops and, fused, three accesses (read u, write S and W): bound by bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import ScanCall, schema, tensors_of
from ..state import MemoryState, MomentumScan
from ._backend import grid_limit, kernels, resolve
from ._check import (
    check_bounds,
    check_cu_seqlens,
    check_fields,
    check_gate,
    check_gates,
    check_state_tensor,
    expect,
    is_float,
    with_good_values,
)
from ._operator import Operator


def _run(*flat: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = flat
    call = ScanCall(*fields)

    def run() -> tuple[Tensor, Tensor]:
        check_bounds(call.cu_seqlens, call.update.shape[1])
        return kernels("momentum_scan", backend).scan_fwd(call)

    return with_good_values(backend, lambda: check_gates(None, call.momentum, call.decay), run)


def _fake(update: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(update.dtype, torch.float32)
    return update.new_empty(update.shape, dtype=dtype), update.new_empty(update.shape, dtype=dtype)


def _run_bwd(
    d_weights: Tensor, d_trace: Tensor, weights: Tensor, trace: Tensor, *flat: Any
) -> list[Tensor]:
    """Gradients of update, momentum, decay and state, absent ones left out."""
    *fields, backend = flat
    call = ScanCall(*fields)
    return kernels("momentum_scan", backend).scan_bwd(d_weights, d_trace, weights, trace, call)


_backward = Operator(
    "momentum_scan_bwd(Tensor d_weights, Tensor d_trace, Tensor weights, Tensor trace, "
    f"{schema(ScanCall)}, str backend) -> Tensor[]",
    _run_bwd,
    lambda *fields: [t.new_empty(t.shape) for t in tensors_of(fields[4:8])],
)
_forward = Operator(
    f"momentum_scan({schema(ScanCall)}, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
    lambda inputs, outputs, d_outputs: _backward(*d_outputs, *outputs, *inputs),
)


def momentum_scan(
    update: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    state: MemoryState | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> MomentumScan:
    """Weights and momentum after every token, for given updates (a memory of any kind).

    Args:
        update: ``[B, T, H, ...]``, any float dtype; a gradient step is ``−θ_t ∇ℓ_t``.
        momentum: ``[B, T, H]``, η in [0, 1], or None for none.
        decay: ``[B, T, H]``, α in [0, 1], or None for none.
        state: one tensor each in ``weights`` and ``momentum``, ``[B, H, ...]`` (with ``cu_seqlens``
            one row per sequence); None starts at zero.
        cu_seqlens: ``[N + 1]`` offsets of ragged sequences along T, with B = 1.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``weights`` and ``momentum``, both ``[B, T, H, ...]``, float32 (float64 for float64).

    Raises:
        ArgumentError: a shape, dtype, device or value does not fit.
        BackendUnavailable: ``backend`` cannot serve this call.

    Example:
        >>> import torch
        >>> from mal_kernels import ops
        >>> gate = torch.full((1, 5, 1), 0.5)
        >>> ops.momentum_scan(torch.ones(1, 5, 1), gate, gate).momentum.flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750, 1.9375])
    """
    expect(
        is_float(update) and update.ndim >= 3,
        "update",
        update,
        "floating point [B, T, H, ...]",
    )
    rows = check_cu_seqlens(cu_seqlens, update)
    check_gate("momentum", momentum, update.shape[:3], update.device)
    check_gate("decay", decay, update.shape[:3], update.device)
    tensors = []
    if state is not None:
        check_fields(state)
        dtype = torch.promote_types(update.dtype, torch.float32)
        for name, field in (("weights", state.weights), ("momentum", state.momentum)):
            expect(len(field) == 1, f"state.{name}", f"{len(field)} tensors", "one tensor")
            shape = (rows, *update.shape[2:])
            check_state_tensor(f"state.{name}[0]", field[0], shape, dtype, update.device)
            tensors.append(field[0])
    limit = "float64 is served by the reference alone" if update.dtype == torch.float64 else None
    name, _ = resolve(
        *(backend, "momentum_scan", update.device, limit or grid_limit(rows, update.shape[2])),
        cuda_limit=limit,
        cpu_limit=limit,
        dtype=update.dtype,
        features=update.shape[3:].numel(),
        tokens=update.shape[0] * update.shape[1],
    )
    call = ScanCall(update, momentum, decay, tensors, cu_seqlens)
    return MomentumScan(*_forward(*call, name))
