"""The memory network ``M(x; W)``: what the definition and the portable backend share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5  # of residual_norm
RMS_NORM_EPS = 1e-6  # of the hidden states in aligned_residual_read

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def memory_network(
    weights: Sequence[Tensor], x: Tensor, activation: str = "gelu", residual_norm: bool = False
) -> Tensor:
    """``M(x; W)``: ``x`` ``[..., T, D]``, weights ``[..., d_in, d_out]``, γ ``[..., D]`` last."""
    act = ACTIVATIONS[activation]
    layers = weights[:-1] if residual_norm else weights
    h = x @ layers[0]
    for w in layers[1:]:
        h = act(h) @ w
    if not residual_norm:
        return h
    return x + (1 + weights[-1].unsqueeze(-2)) * F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
