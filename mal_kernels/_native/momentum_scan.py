"""The scan by a library: what its launchers have in common, whatever they run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..call import ScanCall
from .packing import DTYPES, Fields

# is given the fields of ``mal_momentum_scan_{fwd,bwd}_args``, in order, but for the stream
Launch: TypeAlias = Callable[[Fields], None]


def scan_fwd(call: ScanCall, launch: Launch) -> tuple[Tensor, Tensor]:
    """``weights`` and ``momentum`` after every token, float32 in the shape of ``update``."""
    update = call.update.contiguous()
    weights, trace = (update.new_empty(update.shape, dtype=torch.float32) for _ in range(2))
    outputs = dict(weights=weights, trace=trace)
    launch(dict(**_sizes(call), update=update, **_gates(call), **outputs))
    return weights, trace


def scan_bwd(
    d_weights: Tensor,
    d_trace: Tensor,
    weights: Tensor,
    trace: Tensor,
    call: ScanCall,
    launch: Launch,
    features: int,
) -> list[Tensor]:
    """Gradients of update, momentum, decay and state, absent ones left out.

    Those of gates are partial sums, one for each block of ``features``.
    """
    update, gates = call.update, (call.momentum, call.decay)
    blocks = -(-update.shape[3:].numel() // features)
    d_update = update.new_empty(update.shape)
    d_gates = [
        None if g is None else g.new_empty(blocks, *g.shape, dtype=torch.float32) for g in gates
    ]
    d_state = [x.new_empty(x.shape) for x in call.state]
    fields = dict(
        **_sizes(call),
        tokens=update.shape[:2].numel(),
        d_weights=d_weights.contiguous(),
        d_trace=d_trace.contiguous(),
        weights=weights,
        trace=trace,
        **_gates(call),
        d_update=d_update,
        **dict(zip(("d_momentum", "d_decay"), d_gates, strict=True)),
        **dict(zip(("d_weights0", "d_trace0"), d_state or (None, None), strict=True)),
    )
    launch(fields)
    summed = [
        d.sum(0).to(gate.dtype)
        for d, gate in zip(d_gates, gates, strict=True)
        if d is not None and gate is not None
    ]
    return [d_update, *summed, *d_state]


def _sizes(call: ScanCall) -> Fields:
    batch, tokens, heads, *features = call.update.shape
    rows = batch if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    size = torch.Size(features).numel()
    return dict(dtype=DTYPES[call.update.dtype], rows=rows, T=tokens, H=heads, F=size)


def _gates(call: ScanCall) -> Fields:
    """The fields from the gates to ``cu_seqlens``."""
    _, momentum, decay, state, cu_seqlens = call
    weights0, trace0 = (x.contiguous() for x in state) if state else (None, None)
    return dict(
        momentum=None if momentum is None else momentum.float().contiguous(),
        decay=None if decay is None else decay.float().contiguous(),
        weights0=weights0,
        trace0=trace0,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long().contiguous(),
    )
