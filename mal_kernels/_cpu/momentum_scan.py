"""Launchers of ``csrc/cpu/momentum_scan.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native.packing import scan_gates, scan_sizes
from ..call import ScanCall
from .library import launch

FEATURES = 256  # of a block at most


def scan_fwd(call: ScanCall) -> tuple[Tensor, Tensor]:
    """``weights`` and ``momentum`` after every token, float32 in the shape of ``update``.

    Raises:
        BadValues: a gate is out of bounds.
    """
    update = call.update.contiguous()
    weights, trace = (update.new_empty(update.shape, dtype=torch.float32) for _ in range(2))
    fields = dict(
        **scan_sizes(call),
        threads=torch.get_num_threads(),
        update=update,
        **scan_gates(call),
        weights=weights,
        trace=trace,
    )
    launch("mal_cpu_momentum_scan_fwd", fields)
    return weights, trace


def scan_bwd(
    d_weights: Tensor, d_trace: Tensor, weights: Tensor, trace: Tensor, call: ScanCall
) -> list[Tensor]:
    """Gradients of update, momentum, decay and state, absent ones left out."""
    update, gates = call.update, (call.momentum, call.decay)
    blocks = -(-update.shape[3:].numel() // FEATURES)
    d_update = update.new_empty(update.shape)
    d_gates = [
        None if g is None else g.new_empty(blocks, *g.shape, dtype=torch.float32) for g in gates
    ]
    d_state = [x.new_empty(x.shape) for x in call.state]
    fields = dict(
        **scan_sizes(call),
        tokens=update.shape[:2].numel(),
        threads=torch.get_num_threads(),
        d_weights=d_weights.contiguous(),
        d_trace=d_trace.contiguous(),
        weights=weights,
        trace=trace,
        **scan_gates(call),
        d_update=d_update,
        **dict(zip(("d_momentum", "d_decay"), d_gates, strict=True)),
        **dict(zip(("d_weights0", "d_trace0"), d_state or (None, None), strict=True)),
    )
    launch("mal_cpu_momentum_scan_bwd", fields)
    summed = [
        d.sum(0).to(gate.dtype)
        for d, gate in zip(d_gates, gates, strict=True)
        if d is not None and gate is not None
    ]
    return [d_update, *summed, *d_state]
