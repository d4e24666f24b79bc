"""The read: ``M(q; W)``, every token at the same weights, all tokens in parallel.

``2·D·E`` multiply-adds a token and head for two layers; bytes: q, y and W once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..state import MemoryState
from ._backend import fresh, full_precision, memory_limit, resolve
from ._check import check_bounds, check_cu_seqlens, check_memory, check_tokens


@torch.library.custom_op("mal_kernels::memory_read", mutates_args=())
def _forward(
    q: Tensor,
    weights: list[Tensor],
    cu_seqlens: Tensor | None,
    activation: str,
    residual_norm: bool,
    backend: str,
) -> Tensor:
    check_bounds(cu_seqlens, q.shape[1])
    if backend == "triton":
        from .._triton.memory_read import read_fwd

        return read_fwd(q, weights, cu_seqlens, activation, residual_norm)
    with full_precision(q.device):
        return fresh(_read(q, weights, cu_seqlens, activation, residual_norm))


def _read(
    q: Tensor,
    weights: list[Tensor],
    cu_seqlens: Tensor | None,
    activation: str,
    residual_norm: bool,
) -> Tensor:
    return reference.memory_read(
        q,
        MemoryState(tuple(weights), ()),
        activation=activation,
        residual_norm=residual_norm,
        cu_seqlens=cu_seqlens,
    )


@_forward.register_fake
def _(q, *_):
    return q.new_empty(q.shape)


@torch.library.custom_op("mal_kernels::memory_read_bwd", mutates_args=())
def _backward(
    d_output: Tensor,
    q: Tensor,
    weights: list[Tensor],
    cu_seqlens: Tensor | None,
    activation: str,
    residual_norm: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    if backend == "triton":
        from .._triton.memory_read import read_bwd

        return read_bwd(d_output, q, weights, cu_seqlens, activation, residual_norm)
    with full_precision(q.device):
        vjp = torch.func.vjp(
            lambda q, weights: _read(q, weights, cu_seqlens, activation, residual_norm), q, weights
        )[1]
        d_q, d_weights = vjp(d_output)
    return fresh(d_q), [fresh(d) for d in d_weights]


@_backward.register_fake
def _(d_output, q, weights, *_):
    return q.new_empty(q.shape), [w.new_empty(w.shape) for w in weights]


def _setup_context(ctx, inputs, output):
    q, weights, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, cu_seqlens, *weights)


def _autograd(ctx, d_output):
    q, cu_seqlens, *weights = ctx.saved_tensors
    return (*_backward(d_output, q, weights, cu_seqlens, *ctx.options), None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def memory_read(
    q: Tensor,
    state: MemoryState,
    *,
    activation: str = "gelu",
    residual_norm: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Reads the memory as it is: ``y = M(q; W)``.

    Args:
        q: ``[B, T, H, D]`` queries, any float dtype.
        state: ``B`` rows (with ``cu_seqlens`` one per sequence); only its weights are read.
        activation: gelu (erf), gelu_tanh, silu or relu.
        residual_norm: ``M(x) = x + (1 + γ) ⊙ LayerNorm(mlp(x))``; γ is the state's last tensor.
        cu_seqlens: ``[N + 1]`` offsets of ragged sequences along T, with B = 1.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[B, T, H, D]`` in the dtype of ``q``.

    Raises:
        ArgumentError: a shape, dtype, device or value does not fit.
        BackendUnavailable: ``backend`` cannot serve this call.

    Example:
        >>> import torch
        >>> from mal_kernels import MemoryState, ops
        >>> weights = (torch.randn(1, 2, 16, 32) / 4, torch.randn(1, 2, 32, 16) / 6)
        >>> ops.memory_read(torch.randn(1, 7, 2, 16), MemoryState.from_weights(weights)).shape
        torch.Size([1, 7, 2, 16])
    """
    check_tokens("q", q)
    rows = check_cu_seqlens(cu_seqlens, q)
    check_memory(state, q, rows, residual_norm, activation)
    weights = list(state.weights)
    limit = memory_limit(q.dtype, weights, residual_norm)
    if cu_seqlens is not None and rows > 4096:  # every program finds its sequence among all
        limit = f"the kernels serve up to 4096 ragged sequences, not {rows}"
    name = resolve(
        *(backend, "memory_read", q.device, limit),
        dtype=q.dtype,
        features=q.shape[3],
        tokens=q.shape[0] * q.shape[1],
    )
    return _forward(q, weights, cu_seqlens, activation, residual_norm, name)
