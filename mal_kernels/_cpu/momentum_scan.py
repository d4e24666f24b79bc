"""Launchers of ``csrc/cpu/momentum_scan.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import momentum_scan
from .._native.packing import Fields
from ..call import ScanCall
from .library import launch

FEATURES = 256  # of a block at most: as in csrc/cpu/momentum_scan.cpp


def scan_fwd(call: ScanCall) -> tuple[Tensor, Tensor]:
    """See :func:`mal_kernels._native.momentum_scan.scan_fwd`.

    Raises:
        BadValues: a gate is out of bounds.
    """
    return momentum_scan.scan_fwd(
        call, lambda fields: launch("mal_cpu_momentum_scan_fwd", _here(fields))
    )


def scan_bwd(
    d_weights: Tensor, d_trace: Tensor, weights: Tensor, trace: Tensor, call: ScanCall
) -> list[Tensor]:
    """See :func:`mal_kernels._native.momentum_scan.scan_bwd`."""
    return momentum_scan.scan_bwd(
        *(d_weights, d_trace, weights, trace, call),
        lambda fields: launch("mal_cpu_momentum_scan_bwd", _here(fields)),
        FEATURES,
    )


def _here(fields: Fields) -> Fields:
    return {**fields, "stream": None, "threads": torch.get_num_threads()}
