"""Launchers of ``csrc/momentum_scan.cu``. Computes :func:`mal_kernels.reference.momentum_scan`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native.packing import scan_gates, scan_sizes
from ..call import ScanCall
from . import library

FEATURES = 512  # of a block at most: as in csrc/momentum_scan.h


def scan_fwd(call: ScanCall) -> tuple[Tensor, Tensor]:
    """``weights`` and ``momentum`` after every token, float32 in the shape of ``update``."""
    update = call.update.contiguous()
    weights, trace = (update.new_empty(update.shape, dtype=torch.float32) for _ in range(2))
    library.launch(
        "mal_momentum_scan_fwd",
        update.device,
        **scan_sizes(call),
        update=update,
        **scan_gates(call),
        weights=weights,
        trace=trace,
    )
    return weights, trace


def scan_bwd(
    d_weights: Tensor, d_trace: Tensor, weights: Tensor, trace: Tensor, call: ScanCall
) -> list[Tensor]:
    """Gradients of update, momentum, decay and state, absent ones left out."""
    update, momentum, decay, state, _ = call
    blocks = -(-update.shape[3:].numel() // FEATURES)
    d_update = update.new_empty(update.shape)
    d_momentum, d_decay = (
        None if g is None else g.new_empty(blocks, *g.shape, dtype=torch.float32)
        for g in (momentum, decay)
    )
    d_state = [x.new_empty(x.shape) for x in state]
    d_weights0, d_trace0 = d_state or (None, None)
    library.launch(
        "mal_momentum_scan_bwd",
        update.device,
        **scan_sizes(call),
        tokens=update.shape[:2].numel(),
        d_weights=d_weights.contiguous(),
        d_trace=d_trace.contiguous(),
        weights=weights,
        trace=trace,
        **scan_gates(call),
        d_update=d_update,
        d_momentum=d_momentum,
        d_decay=d_decay,
        d_weights0=d_weights0,
        d_trace0=d_trace0,
    )
    d_gates = [
        partial.sum(0).to(gate.dtype)
        for partial, gate in ((d_momentum, momentum), (d_decay, decay))
        if partial is not None and gate is not None
    ]
    return [d_update, *d_gates, *d_state]
