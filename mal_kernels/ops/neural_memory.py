"""The causal Titans layer: write every token and read it back at its own weights.

Computes :func:`mal_kernels.reference.recurrence`; the mathematics stands there. For one chunk
of ``C`` tokens, one head and two layers of width ``E``::

    write   5·C·D·E multiply-adds (3 for the gradient's factors, 2 for W), 2 more for S
    read    4·C·D·E + 2·C²·(D + E)
    bytes   4·C·D tokens in and out; W and S once per chunk where they do not stay on chip

The operator ``mal_kernels::neural_memory`` also serves :func:`mal_kernels.ops.memory_update`: with
``q=None`` it writes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import MemoryCall, n_chunks, schema, tensors_of
from ..state import MemoryState, NeuralMemoryOutput
from ._backend import cpu_limit, grid_limit, kernels, memory_limit, resolve
from ._check import (
    check_bounds,
    check_chunk_gates,
    check_cu_seqlens,
    check_gate,
    check_gates,
    check_index,
    check_like_weights,
    check_memory,
    check_tokens,
    check_write_options,
    expect,
    is_float,
    once_per_kind,
    with_good_values,
)
from ._operator import Operator


def _run(*flat: Any) -> tuple[Any, ...]:
    *fields, backend = flat
    call = MemoryCall(*fields)

    def run() -> tuple[Any, ...]:
        check_bounds(call.cu_seqlens, call.k.shape[1])
        check_index("state.position", call.position, call.chunk_size)
        if call.step == "chunk":
            gates = dict(momentum=call.momentum, decay=call.decay)
            check_chunk_gates(call.cu_seqlens, call.chunk_size, **gates)
        return kernels("neural_memory", backend).memory_fwd(call)

    return with_good_values(backend, lambda: check_gates(*call.tokens[3:]), run)


def _fake(*flat: Any) -> tuple[Any, ...]:
    call = MemoryCall(*flat[:-1])
    kept, k, weights = call.keeps_position, call.k, call.weights
    return (
        k.new_empty(0) if call.q is None else call.q.new_empty(call.q.shape),
        weights[0].new_empty(call.lr.shape),
        [w.new_empty(w.shape) for w in weights],
        [w.new_empty(w.shape) for w in weights],
        [w.new_empty(w.shape) for w in weights if kept],
        k.new_empty(call.rows if kept else 0, dtype=torch.int64),
    )


def _run_bwd(*flat: Any) -> list[Tensor]:
    """Gradients of every tensor given, in order, absent ones left out."""
    d_outputs, call, backend = flat[:5], MemoryCall(*flat[5:-1]), flat[-1]
    return kernels("neural_memory", backend).memory_bwd(*d_outputs, call)


def _fake_bwd(*flat: Any) -> list[Tensor]:
    call = MemoryCall(*flat[5:-1])
    return [t.new_empty(t.shape) for t in tensors_of(call.differentiable())]


_backward = Operator(
    "neural_memory_bwd(Tensor d_output, Tensor d_surprise, Tensor[] d_weights, Tensor[] d_trace, "
    f"Tensor[] d_anchor, {schema(MemoryCall)}, str backend) -> Tensor[]",
    _run_bwd,
    _fake_bwd,
)
_forward = Operator(
    f"neural_memory({schema(MemoryCall)}, str backend) "
    "-> (Tensor, Tensor, Tensor[], Tensor[], Tensor[], Tensor)",
    _run,
    _fake,
    lambda inputs, outputs, d_outputs: _backward(*d_outputs[:5], *inputs),
)


def neural_memory(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    state: MemoryState,
    *,
    chunk_size: int | None = None,
    step: str = "token",
    activation: str = "gelu",
    residual_norm: bool = False,
    max_grad_norm: float | None = None,
    init: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> NeuralMemoryOutput:
    """Writes ``k → v`` into the memory and reads it with ``q``, causally.

    The layer of Titans (arXiv 2501.00663). With ``step="token"`` token t reads ``W_t``, its own
    write included. With ``step="chunk"`` momentum and decay act once per chunk and a token reads
    the weights at the start of its chunk.

    Args:
        q: ``[B, T, H, D]`` queries; float16, bfloat16, float32 or float64. None: write only, and
            ``output`` comes back empty.
        k: ``[B, T, H, D]`` keys, like ``q``. L2-normalise q and k: otherwise the write diverges.
        v: ``[B, T, H, D]`` values, like ``q``.
        lr: ``[B, T, H]``, θ ≥ 0, write rate.
        momentum: ``[B, T, H]``, η in [0, 1], or None for none. With chunk steps ``[B, NC, H]``,
            ``NC = max(1, ceil(T / chunk_size))`` (with ``cu_seqlens`` summed over sequences).
        decay: like ``momentum``, α in [0, 1], or None.
        state: ``B`` rows (with ``cu_seqlens`` one per sequence), float32 (float64 for float64
            tokens).
        chunk_size: tokens between refreshes of the anchor ``W̄``; part of the model. None: the whole
            call is one chunk.
        step: ``"token"`` or ``"chunk"``.
        activation: gelu (erf), gelu_tanh, silu or relu.
        residual_norm: ``M(x) = x + (1 + γ) ⊙ LayerNorm(mlp(x))``; γ is the state's last tensor.
        max_grad_norm: bound of every token's inner gradient norm; None: no bound.
        init: weights that decay pulls toward, shaped like ``state.weights``; None: zero.
        cu_seqlens: ``[N + 1]`` offsets of ragged sequences along T, with B = 1.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``output`` ``[B, T, H, D]`` in the dtype of ``q``, the next ``state``, and per token the
        ``surprise`` ``‖M(k_t; W̄) − v_t‖²`` ``[B, T, H]``. Differentiable once, in every float
        input.
        Calls chained through ``state`` equal one long call wherever the stream is cut, except that
        ``chunk_size=None`` and chunk steps end a chunk at the end of each call.

    Raises:
        ArgumentError: a shape, dtype, device or value does not fit; nothing has happened.
        BackendUnavailable: ``backend`` cannot serve this call.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from mal_kernels import MemoryState, ops
        >>> q, k, v = (normalize(torch.randn(1, 100, 2, 16), dim=-1) for _ in range(3))
        >>> gate = torch.full((1, 100, 2), 0.01)
        >>> weights = (torch.randn(1, 2, 16, 32) / 4, torch.randn(1, 2, 32, 16) / 6)
        >>> state = MemoryState.from_weights(weights)
        >>> out = ops.neural_memory(q, k, v, gate, gate, gate, state, chunk_size=64)
        >>> out.output.shape, out.state.position
        (torch.Size([1, 100, 2, 16]), tensor([36]))
    """
    options = (chunk_size, step, activation, residual_norm, max_grad_norm)
    tokens = (q, k, v, lr, momentum, decay)
    limits = _limits(tokens, state, init, cu_seqlens, options)
    lists = map(list, (state.weights, state.momentum, state.anchor or (), init or ()))
    fields: list[Any] = [*tokens, *lists, state.position, cu_seqlens, *options]
    name, _ = resolve(
        *(backend, "memory_update" if q is None else "neural_memory", k.device),
        **limits,
        dtype=k.dtype,
        features=k.shape[3],
        tokens=k.shape[0] * k.shape[1],
    )
    return NeuralMemoryOutput.of(*_forward(*fields, name))


@once_per_kind
def _limits(
    tokens: tuple[Any, ...],
    state: MemoryState,
    init: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
    options: tuple[Any, ...],
) -> dict[str, Any]:
    """Checks all but values; returns why backends cannot serve the call, by argument of resolve."""
    chunk_size, step, activation, residual_norm, max_grad_norm = options
    q, k, v, lr, momentum, decay = tokens
    check_tokens("k", k)
    check_tokens("v", v, like=k)
    if q is not None:
        check_tokens("q", q, like=k)
    rows = check_cu_seqlens(cu_seqlens, k)
    check_memory(state, k, rows, residual_norm, activation)
    if init is not None:
        check_like_weights("init", init, state.weights)
    check_write_options(step, chunk_size, max_grad_norm)
    check_gate("lr", lr, k.shape[:3], k.device)
    n_gates = _chunk_gates(k, cu_seqlens, chunk_size) if step == "chunk" else k.shape[1]
    for name, gate in (("momentum", momentum), ("decay", decay)):
        if gate is not None:
            good = is_float(gate) and gate.ndim == 3
            expect(good, name, gate, "floating point [B, T or NC, H], or None")
            n = gate.shape[1:2].numel() if n_gates is None else n_gates
            check_gate(name, gate, (k.shape[0], n, k.shape[2]), k.device)
    expect(
        state.position is None or (step == "token" and chunk_size is not None),
        "state",
        "one inside a chunk",
        f"one at a chunk boundary for step={step!r}, chunk_size={chunk_size}",
        "call state.end_chunk()",
    )
    return dict(
        triton_limit=memory_limit(k.dtype, state.weights, residual_norm),
        cuda_limit=_cuda_limit(k, state.weights, residual_norm),
        cpu_limit=cpu_limit(state.weights, residual_norm),
    )


def _cuda_limit(k: Tensor, weights: Sequence[Tensor], residual_norm: bool) -> str | None:
    """Why the CUDA kernel cannot serve a call."""
    depth, dim, width = len(weights) - residual_norm, k.shape[3], weights[0].shape[3]
    if k.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernel takes float16 and bfloat16 tokens, not {k.dtype}"
    most = 1024 if dim <= 64 else 512  # 16 blocks of a cluster
    if depth > 2 or dim % 8 or dim > 128 or width > most:
        return (
            "the CUDA kernel serves depth 1 and 2, a multiple of 8 features up to 128 and, of this "
            f"many, up to {most} hidden units; not depth {depth}, {dim} features, {width} units"
        )
    if limit := grid_limit(*weights[0].shape[:2]):
        return limit
    if k.is_cuda and torch.cuda.get_device_capability(k.device) < (9, 0):
        return "the CUDA kernel needs the clusters of compute capability 9.0"
    return None


def _chunk_gates(k: Tensor, cu_seqlens: Tensor | None, chunk_size: int | None) -> int | None:
    """Chunk gates along dim 1; None where their number depends on the values of ``cu_seqlens``."""
    if cu_seqlens is None:
        return n_chunks(k.shape[1], chunk_size)
    return len(cu_seqlens) - 1 if chunk_size is None else None
