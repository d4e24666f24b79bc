"""The read ``M(q; W)`` and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from ..call import ReadCall
from ..network import ACTIVATIONS, memory_network
from .activations import ACTIVATION_BACKWARD, layer_norm, layer_norm_backward
from .grid import Grid
from .portable import fresh, portable


def read_fwd(call: ReadCall) -> Tensor:
    """``[B, T, H, D]`` in the dtype of ``q``."""
    act, norm = call.activation, call.residual_norm
    with portable(call.q.device):
        pack, unpack = _layout(call)
        weights = fold(call.weights)
        return fresh(unpack([memory_network(weights, x, act, norm) for x in pack(call.q)]))


def read_bwd(d_output: Tensor, call: ReadCall) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``q`` and of every tensor of ``weights``."""
    act, norm = call.activation, call.residual_norm
    with portable(call.q.device):
        pack, unpack = _layout(call)
        weights = fold(call.weights)
        d_q, d_weights = [], [torch.zeros_like(w) for w in weights]
        for x, dy in zip(pack(call.q), pack(d_output), strict=True):
            d_x, d_weights = network_backward(weights, x, dy, act, norm)
            d_q.append(d_x)
        pairs = zip(d_weights, call.weights, strict=True)
        return fresh(unpack(d_q)), [fresh(d.view(w.shape)) for d, w in pairs]


def _layout(call: ReadCall) -> tuple[Callable[[Tensor], Tensor], Callable[[list[Tensor]], Tensor]]:
    """Tokens to one chunk ``[1, G, T, D]`` in the dtype of the weights, and back to those of q."""
    q, dtype = call.q, call.weights[0].dtype
    if call.cu_seqlens is not None:
        grid = Grid.of(q, call.cu_seqlens)
        return lambda x: grid.pack(x.to(dtype)), lambda chunks: grid.unpack(chunks, q)
    return (
        lambda x: rearrange(x.to(dtype), "b t h d -> 1 (b h) t d"),
        lambda chunks: rearrange(chunks[0], "(b h) t d -> b t h d", h=q.shape[2]).to(q.dtype),
    )


def network_backward(
    weights: Sequence[Tensor], x: Tensor, dy: Tensor, activation: str, residual_norm: bool
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``x`` and of the weights of :func:`memory_network`."""
    layers = weights[:-1] if residual_norm else weights
    xs, zs = [x], [x @ layers[0]]
    for w in layers[1:]:
        xs.append(ACTIVATIONS[activation](zs[-1]))
        zs.append(xs[-1] @ w)
    d, d_weights = dy, []
    if residual_norm:
        normed, inverse_std = layer_norm(zs[-1])
        d_weights.append((dy * normed).sum(-2))
        gain = 1 + weights[-1].unsqueeze(-2)
        d = layer_norm_backward(dy * gain, normed, inverse_std)
    for i in reversed(range(len(layers))):
        d_weights.insert(0, xs[i].mT @ d)
        d = d @ layers[i].mT
        if i:
            d = ACTIVATION_BACKWARD[activation](d, zs[i - 1])
    return d + dy if residual_norm else d, d_weights


def fold(layers: Sequence[Tensor]) -> list[Tensor]:
    """``[N, H, ...]`` to ``[G, ...]``."""
    return [w.flatten(0, 1) for w in layers]
