"""The read of Memory-as-a-Layer: from host hidden states to host hidden states.

For the tokens named by ``token_index``, each at the state named by ``state_index``::

    x = RMSNorm(hidden) · norm      q = x W_qᵀ / ‖x W_qᵀ‖ per head      g = silu(x W_gateᵀ)
    hidden += (M(q; W) ⊙ g) W_outᵀ

Every other row of ``hidden`` comes back bit for bit. ``3·Dm·H·D + 2·H·D·E`` multiply-adds a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import AlignedCall, schema
from ..state import MemoryState, ReadParams
from ._backend import cpu_limit, kernels, memory_limit, resolve
from ._check import (
    check_fields,
    check_index,
    check_memory,
    check_state_tensor,
    expect,
    is_float,
    with_good_values,
)
from ._operator import Operator


def _run(*flat: Any) -> Tensor:
    *fields, backend = flat
    return _computed(AlignedCall(*fields), backend)


def _computed(call: AlignedCall, backend: str, in_place: bool = False) -> Tensor:
    def run() -> Tensor:
        return kernels("aligned_residual_read", backend).aligned_fwd(call, in_place=in_place)

    return with_good_values(backend, lambda: _check_places(call), run)


def _check_places(call: AlignedCall) -> None:
    """Values of the indices."""
    check_index("token_index", call.token_index, call.hidden.shape[:-1].numel())
    check_index("state_index", call.state_index, call.weights[0].shape[0])
    index = call.token_index
    expect(
        index.device.type != "cpu" or len(index.unique()) == len(index),
        "token_index",
        "the same position twice",
        "every audio token once",
    )


def _run_bwd(d_output: Tensor, *flat: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *fields, backend = flat
    # the kernel of the CPU is for inference: large products, as in its gradients, are torch's
    backend = "reference" if backend == "cpu" else backend
    return kernels("aligned_residual_read", backend).aligned_bwd(d_output, AlignedCall(*fields))


def _fake_bwd(d_output: Tensor, *flat: Any) -> Any:
    call = AlignedCall(*flat[:-1])
    d_weights, d_params = ([t.new_empty(t.shape) for t in x] for x in (call.weights, call.params))
    return call.hidden.new_empty(call.hidden.shape), d_weights, d_params


_backward = Operator(
    f"aligned_residual_read_bwd(Tensor d_output, {schema(AlignedCall)}, str backend) "
    "-> (Tensor, Tensor[], Tensor[])",
    _run_bwd,
    _fake_bwd,
)


def _gradient(inputs: list[Any], outputs: list[Any], d_outputs: list[Any]) -> list[Any]:
    d_hidden, d_weights, d_params = _backward(*d_outputs, *inputs)
    return [d_hidden, None, None, *d_weights, *d_params]


_forward = Operator(
    f"aligned_residual_read({schema(AlignedCall)}, str backend) -> Tensor",
    _run,
    lambda hidden, *_: hidden.new_empty(hidden.shape),
    _gradient,
)


# not an Operator: torch counts the versions of what a custom_op changes
@torch.library.custom_op(
    "mal_kernels::aligned_residual_read_",
    mutates_args=("hidden",),
    schema=f"({schema(AlignedCall).replace('Tensor', 'Tensor(a0!)', 1)}, str backend) -> ()",
)
def _forward_(*flat):
    *fields, backend = flat
    _computed(AlignedCall(*fields), backend, in_place=True)


@_forward_.register_fake
def _(*_):
    return None


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
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` (float16 and
            bfloat16 ``hidden``, no gradients).

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
    call = _checked(*(hidden, token_index, state_index, state, params), activation, residual_norm)
    return _forward(*call, _backend_of(call, backend))


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
    """Adds what the memory says to ``hidden`` itself, for inference.

    The result is that of :func:`aligned_residual_read`. The kernels touch the named rows alone, in
    three launches (Triton) or in one (CUDA), and do not copy ``hidden``.

    Args:
        hidden: ``[B, S, Dm]`` host hidden states, any float dtype, contiguous; changed.
        token_index: ``[N]`` int64, positions of the audio tokens in ``hidden`` flattened to
            ``[B·S]``, no position twice.
        state_index: ``[N]`` int64, the row of ``state`` that each token reads.
        state: any number of rows; only its weights are read.
        params: ``norm`` ``[Dm]``, ``w_q`` and ``w_gate`` ``[H·D, Dm]``, ``w_out`` ``[Dm, H·D]``, in
            any float dtype; the computation runs in the dtype of the state.
        activation: gelu (erf), gelu_tanh, silu or relu.
        residual_norm: ``M(x) = x + (1 + γ) ⊙ LayerNorm(mlp(x))``; γ is the state's last tensor.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` (float16 and
            bfloat16).

    Returns:
        ``hidden``.

    Raises:
        ArgumentError: a shape, dtype, device or value does not fit, ``hidden`` is not contiguous,
            or a gradient would be recorded; ``hidden`` is as it was.
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
    call = _checked(*(hidden, token_index, state_index, state, params), activation, residual_norm)
    expect(
        hidden.is_contiguous(),
        "hidden",
        f"strides {list(hidden.stride())}",
        "a contiguous tensor",
        "use aligned_residual_read",
    )
    expect(
        not _records_gradients(call),
        "hidden",
        "a call that records gradients",
        "inference: what is overwritten cannot be differentiated",
        "use torch.no_grad(), or aligned_residual_read",
    )
    _forward_(*call, _backend_of(call, backend))
    return hidden


def _records_gradients(call: AlignedCall) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in call.differentiable())


def _checked(
    hidden: Tensor,
    token_index: Tensor,
    state_index: Tensor,
    state: MemoryState,
    params: ReadParams,
    activation: str,
    residual_norm: bool,
) -> AlignedCall:
    """The call, of arguments with fitting shapes."""
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
    return AlignedCall(
        hidden=hidden,
        token_index=token_index,
        state_index=state_index,
        weights=list(state.weights),
        params=list(params),
        activation=activation,
        residual_norm=residual_norm,
    )


def _backend_of(call: AlignedCall, backend: str) -> str:
    hidden, weights = call.hidden, call.weights
    limit = memory_limit(hidden.dtype, weights, call.residual_norm, linear=128)
    name, _ = resolve(
        *(backend, "aligned_residual_read", hidden.device, limit),
        cuda_limit=limit or _cuda_limit(call),
        cpu_limit=cpu_limit(weights, call.residual_norm),
        dtype=hidden.dtype,
        features=weights[0].shape[2],
        tokens=len(call.token_index),
    )
    return name


def _cuda_limit(call: AlignedCall) -> str | None:
    """Why the CUDA kernel cannot serve a memory that the Triton kernels serve."""
    if _records_gradients(call):
        return "the CUDA kernel has no backward yet: call it under torch.no_grad()"
    if call.hidden.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernel takes float16 and bfloat16 hidden states, not {call.hidden.dtype}"
    width, dim = call.hidden.shape[2], call.weights[0].shape[2]
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
