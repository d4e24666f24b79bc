"""The read: ``M(q; W)``, every token at the same weights, all tokens in parallel.

``2·D·E`` multiply-adds a token and head for two layers; bytes: q, y and W once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..call import ReadCall, schema
from ..state import MemoryState
from ._backend import cpu_limit, kernels, memory_limit, resolve
from ._check import check_bounds, check_cu_seqlens, check_memory, check_tokens
from ._operator import Operator


def _run(*flat: Any) -> Tensor:
    *fields, backend = flat
    call = ReadCall(*fields)
    check_bounds(call.cu_seqlens, call.q.shape[1])
    return kernels("memory_read", backend).read_fwd(call)


def _run_bwd(d_output: Tensor, *flat: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, backend = flat
    return kernels("memory_read", backend).read_bwd(d_output, ReadCall(*fields))


def _fake_bwd(d_output: Tensor, q: Tensor, weights: list[Tensor], *_: Any) -> Any:
    return q.new_empty(q.shape), [w.new_empty(w.shape) for w in weights]


_backward = Operator(
    f"memory_read_bwd(Tensor d_output, {schema(ReadCall)}, str backend) -> (Tensor, Tensor[])",
    _run_bwd,
    _fake_bwd,
)


def _gradient(inputs: list[Any], outputs: list[Any], d_outputs: list[Any]) -> list[Tensor]:
    d_q, d_weights = _backward(*d_outputs, *inputs)
    return [d_q, *d_weights]


_forward = Operator(
    f"memory_read({schema(ReadCall)}, str backend) -> Tensor",
    _run,
    lambda q, *_: q.new_empty(q.shape),
    _gradient,
)


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
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

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
    limit = memory_limit(q.dtype, state.weights, residual_norm)
    if cu_seqlens is not None and rows > 4096:  # every program finds its sequence among all
        limit = f"the kernels serve up to 4096 ragged sequences, not {rows}"
    name, _ = resolve(
        *(backend, "memory_read", q.device, limit),
        cpu_limit=cpu_limit(state.weights, residual_norm),
        dtype=q.dtype,
        features=q.shape[3],
        tokens=q.shape[0] * q.shape[1],
    )
    call = ReadCall(q, list(state.weights), cu_seqlens, activation, residual_norm)
    return _forward(*call, name)
