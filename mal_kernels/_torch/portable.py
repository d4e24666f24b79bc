"""How the portable backend computes: outside of autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def portable(device: torch.device) -> torch.autocast:
    """Inside, a surrounding autocast is off: state and accumulators are float32."""
    return torch.autocast(device.type, enabled=False)


def fresh(x: Tensor) -> Tensor:
    """A contiguous copy: outputs alias nothing and have the strides that the fake promises."""
    return x.clone(memory_format=torch.contiguous_format)


def per_head(gate: Tensor, like: Tensor) -> Tensor:
    """``gate`` with trailing dimensions of 1 up to the rank of ``like``."""
    return gate.reshape(*gate.shape, *(1,) * (like.ndim - gate.ndim))
