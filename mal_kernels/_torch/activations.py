"""Derivatives of the activations and of the norms, for the backward passes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..network import LAYER_NORM_EPS

# --- activations: act'(z) ⊙ d of d and z, and act''(z) --------------------------------------------


def _silu_backward(d: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)  # aten's own silu_backward has no derivative
    return d * s * (1 + z * (1 - s))


ACTIVATION_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": _silu_backward,
    "relu": lambda d, z: torch.ops.aten.threshold_backward(d, z, 0),
}


def _gelu_second(z: Tensor) -> Tensor:
    square = z * z
    return torch.exp(-0.5 * square) * (2 - square) / math.sqrt(2 * math.pi)


def _gelu_tanh_second(z: Tensor) -> Tensor:
    """``f = z (1 + tanh p) / 2`` with ``p = c (z + a z³)``."""
    c, a, square = math.sqrt(2 / math.pi), 0.044715, z * z
    tanh = torch.tanh(c * z * (1 + a * square))
    p1, p2 = c * (1 + 3 * a * square), 6 * c * a * z
    return (1 - tanh * tanh) * (p1 + 0.5 * z * (p2 - 2 * tanh * p1 * p1))


def _silu_second(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


ACTIVATION_SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu_second,
    "gelu_tanh": _gelu_tanh_second,
    "silu": _silu_second,
    "relu": torch.zeros_like,
}


# --- LayerNorm ------------------------------------------------------------------------------------


def layer_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    """``n`` of mean 0 and variance 1 along the last dimension, and 1 / std ``[..., 1]``."""
    mean = z.mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(z.var(-1, keepdim=True, correction=0) + LAYER_NORM_EPS)
    return (z - mean) * inverse_std, inverse_std


def layer_norm_backward(d: Tensor, n: Tensor, inverse_std: Tensor) -> Tensor:
    """The gradient of ``z`` from that of ``n``."""
    projected = (d * n).mean(-1, keepdim=True)
    return inverse_std * (d - d.mean(-1, keepdim=True) - n * projected)
