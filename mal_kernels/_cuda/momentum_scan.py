"""Launchers of ``csrc/momentum_scan.cu``. Computes :func:`mal_kernels.reference.momentum_scan`."""

from __future__ import annotations

from torch import Tensor

from .._native import momentum_scan
from ..call import ScanCall
from . import library

FEATURES = 512  # of a block at most: as in csrc/momentum_scan.h


def scan_fwd(call: ScanCall) -> tuple[Tensor, Tensor]:
    """See :func:`mal_kernels._native.momentum_scan.scan_fwd`."""
    device = call.update.device
    return momentum_scan.scan_fwd(
        call, lambda fields: library.launch("mal_momentum_scan_fwd", device, **fields)
    )


def scan_bwd(
    d_weights: Tensor, d_trace: Tensor, weights: Tensor, trace: Tensor, call: ScanCall
) -> list[Tensor]:
    """See :func:`mal_kernels._native.momentum_scan.scan_bwd`."""
    device = call.update.device
    return momentum_scan.scan_bwd(
        *(d_weights, d_trace, weights, trace, call),
        lambda fields: library.launch("mal_momentum_scan_bwd", device, **fields),
        FEATURES,
    )
