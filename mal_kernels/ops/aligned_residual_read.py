"""The read of Memory-as-a-Layer: from host hidden states to host hidden states.

For the tokens named by ``token_index``, each at the state named by ``state_index``::

    x = RMSNorm(hidden) · norm      q = x W_qᵀ / ‖x W_qᵀ‖ per head      g = silu(x W_gateᵀ)
    hidden += (M(q; W) ⊙ g) W_outᵀ

Every other row of ``hidden`` comes back bit for bit. ``3·Dm·H·D + 2·H·D·E`` multiply-adds a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..errors import ArgumentError
from ..reference import ReadParams
from ..state import MemoryState
from ._backend import fresh, full_precision, memory_limit, resolve
from ._check import (
    check_fields,
    check_index,
    check_memory,
    check_state_tensor,
    expect,
    is_float,
)


@torch.library.custom_op("mal_kernels::aligned_residual_read", mutates_args=())
def _forward(
    hidden: Tensor,
    token_index: Tensor,
    state_index: Tensor,
    weights: list[Tensor],
    params: list[Tensor],
    activation: str,
    residual_norm: bool,
    backend: str,
) -> Tensor:
    _check_places(hidden, token_index, state_index, weights)
    inputs = (hidden, token_index, state_index, weights, params, activation, residual_norm)
    if launch := _launcher(backend):
        return launch(*inputs)
    with full_precision(hidden.device):
        return fresh(_read(*inputs))


def _check_places(
    hidden: Tensor, token_index: Tensor, state_index: Tensor, weights: list[Tensor]
) -> None:
    """Values of the indices."""
    check_index("token_index", token_index, hidden.shape[:-1].numel())
    check_index("state_index", state_index, weights[0].shape[0])
    if token_index.device.type == "cpu" and len(token_index.unique()) < len(token_index):
        raise ArgumentError(
            "token_index: got the same position twice, expected every audio token once"
        )


def _launcher(backend: str) -> Callable[..., Tensor] | None:
    """What runs the kernels of ``backend``; None for the reference."""
    if backend == "triton":
        from .._triton.aligned_residual_read import aligned_fwd
    elif backend == "cuda":
        from .._cuda.aligned_residual_read import aligned_fwd
    else:
        return None
    return aligned_fwd


def _read(
    hidden: Tensor,
    token_index: Tensor,
    state_index: Tensor,
    weights: list[Tensor],
    params: list[Tensor],
    activation: str,
    residual_norm: bool,
) -> Tensor:
    return reference.aligned_residual_read(
        *(hidden, token_index, state_index),
        *(MemoryState(tuple(weights), ()), ReadParams(*params)),
        activation=activation,
        residual_norm=residual_norm,
    )


@_forward.register_fake
def _(hidden, *_):
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("mal_kernels::aligned_residual_read_", mutates_args=("hidden",))
def _forward_(
    hidden: Tensor,
    token_index: Tensor,
    state_index: Tensor,
    weights: list[Tensor],
    params: list[Tensor],
    activation: str,
    residual_norm: bool,
    backend: str,
) -> None:
    _check_places(hidden, token_index, state_index, weights)
    inputs = (hidden, token_index, state_index, weights, params, activation, residual_norm)
    if launch := _launcher(backend):
        launch(*inputs, in_place=True)
        return
    with full_precision(hidden.device):
        hidden.copy_(_read(*inputs))


@_forward_.register_fake
def _(*_):
    return None


@torch.library.custom_op("mal_kernels::aligned_residual_read_bwd", mutates_args=())
def _backward(
    d_output: Tensor,
    hidden: Tensor,
    token_index: Tensor,
    state_index: Tensor,
    weights: list[Tensor],
    params: list[Tensor],
    activation: str,
    residual_norm: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    if backend == "triton":
        from .._triton.aligned_residual_read import aligned_bwd

        inputs = (hidden, token_index, state_index, weights, params, activation, residual_norm)
        return aligned_bwd(d_output, *inputs)

    def forward(hidden, weights, params):
        return _read(hidden, token_index, state_index, weights, params, activation, residual_norm)

    with full_precision(hidden.device):
        vjp = torch.func.vjp(forward, hidden, weights, params)[1]
        d_hidden, d_weights, d_params = vjp(d_output)
    return fresh(d_hidden), [fresh(d) for d in d_weights], [fresh(d) for d in d_params]


@_backward.register_fake
def _(d_output, hidden, token_index, state_index, weights, params, *_):
    d_weights, d_params = ([t.new_empty(t.shape) for t in x] for x in (weights, params))
    return hidden.new_empty(hidden.shape), d_weights, d_params


def _setup_context(ctx, inputs, output):
    hidden, token_index, state_index, weights, params, *ctx.options = inputs
    ctx.n_weights = len(weights)
    ctx.save_for_backward(hidden, token_index, state_index, *weights, *params)


def _autograd(ctx, d_output):
    *index, tensors = ctx.saved_tensors[:3], list(ctx.saved_tensors[3:])
    weights, params = tensors[: ctx.n_weights], tensors[ctx.n_weights :]
    d_hidden, d_weights, d_params = _backward(d_output, *index[0], weights, params, *ctx.options)
    return d_hidden, None, None, d_weights, d_params, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def aligned_residual_read(
    hidden: Tensor,
    token_index: Tensor,
    state_index: Tensor,
    state: MemoryState,
    params: ReadParams,
    *,
    activation: str = "gelu",
    residual_norm: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Adds what the memory says about the audio tokens to their hidden states.

    Args:
        hidden: ``[B, S, Dm]`` host hidden states, any float dtype.
        token_index: ``[N]`` int64, positions of the audio tokens in ``hidden`` flattened to
            ``[B·S]``, no position twice.
        state_index: ``[N]`` int64, the row of ``state`` that each token reads.
        state: any number of rows; only its weights are read.
        params: ``norm`` ``[Dm]``, ``w_q`` and ``w_gate`` ``[H·D, Dm]``, ``w_out`` ``[Dm, H·D]``, in
            any float dtype; the computation runs in the dtype of the state.
        activation: gelu (erf), gelu_tanh, silu or relu.
        residual_norm: ``M(x) = x + (1 + γ) ⊙ LayerNorm(mlp(x))``; γ is the state's last tensor.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cuda"`` (float16 and bfloat16
            ``hidden``, no gradients).

    Returns:
        ``[B, S, Dm]`` in the dtype of ``hidden``; a new tensor.

    Raises:
        ArgumentError: a shape, dtype, device or value does not fit.
        BackendUnavailable: ``backend`` cannot serve this call.

    Example:
        >>> import torch
        >>> from mal_kernels import MemoryState, ops
        >>> hidden, audio = torch.randn(2, 6, 24), torch.tensor([1, 2, 9, 10])
        >>> weights = (torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8))
        >>> w_q, w_gate = torch.randn(2, 16, 24)
        >>> params = ops.ReadParams(torch.ones(24), w_q, w_gate, torch.randn(24, 16))
        >>> out = ops.aligned_residual_read(
        ...     hidden, audio, audio // 6, MemoryState.from_weights(weights), params
        ... )
        >>> (out != hidden).any(-1).flatten().nonzero().flatten()
        tensor([ 1,  2,  9, 10])
    """
    inputs = _checked(*(hidden, token_index, state_index, state, params), activation, residual_norm)
    return _forward(*inputs, _backend_of(inputs, backend))


def aligned_residual_read_(
    hidden: Tensor,
    token_index: Tensor,
    state_index: Tensor,
    state: MemoryState,
    params: ReadParams,
    *,
    activation: str = "gelu",
    residual_norm: bool = False,
    backend: str = "auto",
) -> Tensor:
    """:func:`aligned_residual_read` into ``hidden`` itself, for inference.

    The kernels touch the named rows alone, in three launches (Triton) or in one (CUDA), and do not
    copy ``hidden``.

    Args:
        hidden: ``[B, S, Dm]``, contiguous; changed.
        token_index: as there, and so are the other arguments.
        state_index: ``[N]``.
        state: any number of rows.
        params: of the read.
        activation: gelu (erf), gelu_tanh, silu or relu.
        residual_norm: as there.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``hidden``.

    Raises:
        ArgumentError: as there, or ``hidden`` is not contiguous, or a gradient would be recorded;
            ``hidden`` is as it was.
        BackendUnavailable: ``backend`` cannot serve this call.

    Example:
        >>> import torch
        >>> from mal_kernels import MemoryState, ops
        >>> hidden, audio = torch.randn(2, 6, 24), torch.tensor([1, 2, 9, 10])
        >>> state = MemoryState.from_weights([torch.randn(2, 2, 8, 8)] * 2)
        >>> w_q, w_gate = torch.randn(2, 16, 24)
        >>> params = ops.ReadParams(torch.ones(24), w_q, w_gate, torch.randn(24, 16))
        >>> new = ops.aligned_residual_read(hidden, audio, audio // 6, state, params)
        >>> out = ops.aligned_residual_read_(hidden, audio, audio // 6, state, params)
        >>> out is hidden, torch.equal(out, new)
        (True, True)
    """
    inputs = _checked(*(hidden, token_index, state_index, state, params), activation, residual_norm)
    expect(
        hidden.is_contiguous(),
        "hidden",
        f"strides {list(hidden.stride())}",
        "a contiguous tensor",
        "use aligned_residual_read",
    )
    expect(
        not _records_gradients(inputs),
        "hidden",
        "a call that records gradients",
        "inference: what is overwritten cannot be differentiated",
        "use torch.no_grad(), or aligned_residual_read",
    )
    _forward_(*inputs, _backend_of(inputs, backend))
    return hidden


def _records_gradients(inputs: tuple[Any, ...]) -> bool:
    hidden, _, _, weights, params, *_ = inputs
    return torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *weights, *params))


def _checked(
    hidden: Tensor,
    token_index: Tensor,
    state_index: Tensor,
    state: MemoryState,
    params: ReadParams,
    activation: str,
    residual_norm: bool,
) -> tuple[Any, ...]:
    """The operator's arguments but for the backend, of fitting shapes."""
    expect(
        is_float(hidden) and hidden.ndim == 3,
        "hidden",
        hidden,
        "floating point [B, S, Dm]",
    )
    for name, index in (("token_index", token_index), ("state_index", state_index)):
        check_state_index(name, index, token_index, hidden.device)
    check_fields(state)
    first = state.weights[0] if state.weights else None
    expect(first is not None and first.ndim == 4, "state.weights[0]", first, "[B, H, D, E]")
    # not state.batch_size: torch.compile of torch 2.10 cannot follow a property
    width, (rows, heads, dim) = hidden.shape[-1], state.weights[0].shape[:3]
    like = hidden.new_empty(0, 0, heads, dim)
    check_memory(state, like, rows, residual_norm, activation)
    inner = heads * dim
    shapes = ((width,), (inner, width), (inner, width), (width, inner))
    expect(isinstance(params, ReadParams), "params", params, "a ReadParams")
    for name, p, shape in zip(ReadParams._fields, params, shapes, strict=True):
        expect(is_float(p), f"params.{name}", p, f"floating point {list(shape)}")
        check_state_tensor(f"params.{name}", p, shape, p.dtype, hidden.device)
    weights = list(state.weights)
    return (hidden, token_index, state_index, weights, list(params), activation, residual_norm)


def _backend_of(inputs: tuple[Any, ...], backend: str) -> str:
    hidden, token_index, _, weights, _, _, residual_norm = inputs
    limit = memory_limit(hidden.dtype, weights, residual_norm, linear=128)
    return resolve(
        *(backend, "aligned_residual_read", hidden.device, limit),
        cuda_limit=limit or _cuda_limit(inputs),
        dtype=hidden.dtype,
        features=weights[0].shape[2],
        tokens=len(token_index),
    )


def _cuda_limit(inputs: tuple[Any, ...]) -> str | None:
    """Why the CUDA kernel cannot serve a memory that the Triton kernels serve."""
    if _records_gradients(inputs):
        return "the CUDA kernel has no backward yet: call it under torch.no_grad()"
    hidden, _, _, weights, *_ = inputs
    if hidden.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernel takes float16 and bfloat16 hidden states, not {hidden.dtype}"
    width, dim = hidden.shape[2], weights[0].shape[2]
    if width % 8 or dim % 8:
        return (
            "the CUDA kernel serves multiples of 8 features of the host and of a head; "
            f"not {width} and {dim}"
        )
    return None


def check_state_index(name: str, index: Tensor, like: Tensor, device: torch.device) -> None:
    """``[N]`` int64 on ``device``, as many as ``like`` has."""
    good = isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64
    expect(good, name, index, "int64 [N]")
    expect(len(index) == len(like), name, f"{len(index)}", f"{len(like)}, one per token")
    expect(index.device == device, name, f"on {index.device}", f"on {device} like hidden")
