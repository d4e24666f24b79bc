"""Argument checks shared by the ops: shapes and types, then values (see :func:`checks_values`)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..reference import ACTIVATIONS
from ..state import MemoryState

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expect(ok: bool, name: str, got: object, expected: str, remedy: str = "") -> None:
    """Raises ArgumentError naming the argument, what it was, what was expected and what to do."""
    if not ok:
        tail = f"; {remedy}" if remedy else ""
        raise ArgumentError(f"{name}: got {got}, expected {expected}{tail}")


def check_tokens(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """``[B, T, H, D]`` floating point; same shape, dtype and device as ``like``."""
    expect(isinstance(x, Tensor), name, type(x).__name__, "a tensor [B, T, H, D]")
    expect(x.ndim == 4, name, f"shape {list(x.shape)}", "4 dimensions [B, T, H, D]")
    expect(x.dtype in FLOATS, name, x.dtype, "a floating point dtype", "cast it first")
    if like is not None:
        expect(
            x.shape == like.shape and x.dtype == like.dtype and x.device == like.device,
            name,
            f"{x.dtype} {list(x.shape)} on {x.device}",
            f"{like.dtype} {list(like.shape)} on {like.device} like the other tokens",
        )


def check_gate(name: str, gate: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """A gate of ``shape``, or None."""
    if gate is None:
        return
    expect(
        tuple(gate.shape) == tuple(shape) and gate.dtype in FLOATS and gate.device == device,
        name,
        f"{gate.dtype} {list(gate.shape)} on {gate.device}",
        f"floating point {list(shape)} on {device}",
    )


def checks_values(x: Tensor) -> bool:
    """Always on the CPU; elsewhere that synchronises the device, so only with ``MAL_CHECK=1``."""
    return x.device.type == "cpu" or os.environ.get("MAL_CHECK") == "1"


def check_gates(lr: Tensor | None, momentum: Tensor | None, decay: Tensor | None) -> None:
    """Values: lr finite and ≥ 0, momentum and decay in [0, 1]."""
    for name, gate, top in (("lr", lr, None), ("momentum", momentum, 1), ("decay", decay, 1)):
        if gate is None or gate.numel() == 0 or not checks_values(gate):
            continue
        low, high = (float(x) for x in gate.detach().aminmax())
        bound = torch.finfo(gate.dtype).max if top is None else top
        expect(
            low >= 0 and high <= bound,  # false for NaN
            name,
            f"values from {low:.3g} to {high:.3g}",
            "finite values ≥ 0" if top is None else "values in [0, 1]",
            "apply a sigmoid to the gate's logits",
        )


def check_chunk_gates(
    cu_seqlens: Tensor | None, chunk_size: int | None, **gates: Tensor | None
) -> None:
    """Ragged chunk steps: one gate per chunk of every sequence, at least one a sequence."""
    if cu_seqlens is None or chunk_size is None or not checks_values(cu_seqlens):
        return
    n = int((-(-cu_seqlens.diff() // chunk_size)).clamp(min=1).sum())
    for name, gate in gates.items():
        if gate is not None:
            expect(gate.shape[1] == n, name, f"{gate.shape[1]} chunks", f"{n} for cu_seqlens")


def check_memory(
    state: MemoryState, tokens: Tensor, rows: int, residual_norm: bool, activation: str
) -> None:
    """The state fits ``tokens`` ``[B, T, H, D]`` and ``rows`` sequences."""
    expect(activation in ACTIVATIONS, "activation", repr(activation), f"one of {[*ACTIVATIONS]}")
    expect(isinstance(state, MemoryState), "state", type(state).__name__, "a MemoryState")
    heads, dim = tokens.shape[2:]
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    layers = len(state.weights) - residual_norm
    expect(layers >= 1, "state.weights", f"{len(state.weights)} tensors", "at least one layer")
    width = dim
    for i, w in enumerate(state.weights):
        gain = i == layers  # γ of residual_norm
        out = dim if i >= layers - 1 else w.shape[-1]
        shape = (rows, heads, dim) if gain else (rows, heads, width, out)
        check_state_tensor(f"state.weights[{i}]", w, shape, dtype, tokens.device)
        width = out
    for field in ("momentum", "anchor"):
        tensors = getattr(state, field)
        if tensors is not None:
            check_like_weights(f"state.{field}", tensors, state.weights)
    expect(
        (state.anchor is None) == (state.position is None),
        "state",
        "anchor without position" if state.position is None else "position without anchor",
        "both or neither",
        "take both from the state that the last call returned",
    )


def check_state_tensor(
    name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    expect(
        tuple(x.shape) == tuple(shape) and x.dtype == dtype and x.device == device,
        name,
        f"{x.dtype} {list(x.shape)} on {x.device}",
        f"{dtype} {list(shape)} on {device}",
        "a state belongs to one memory size; state is float32 (float64 for float64 tokens)",
    )


def check_like_weights(name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """One tensor per layer with the shape, dtype and device of the weights."""
    expect(
        len(tensors) == len(weights), name, f"{len(tensors)} tensors", f"{len(weights)}, per layer"
    )
    for i, (x, w) in enumerate(zip(tensors, weights, strict=True)):
        check_state_tensor(f"{name}[{i}]", x, w.shape, w.dtype, w.device)


def check_cu_seqlens(cu_seqlens: Tensor | None, tokens: Tensor) -> int:
    """Returns the number of sequences."""
    if cu_seqlens is None:
        return tokens.shape[0]
    expect(
        tokens.shape[0] == 1,
        "cu_seqlens",
        f"given with B = {tokens.shape[0]}",
        "B = 1 with all sequences one after another along T",
    )
    expect(
        cu_seqlens.ndim == 1
        and len(cu_seqlens) >= 2
        and cu_seqlens.dtype in (torch.int32, torch.int64),
        "cu_seqlens",
        f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}",
        "int32 or int64 [N + 1]",
    )
    return len(cu_seqlens) - 1


def check_bounds(cu_seqlens: Tensor | None, tokens: int) -> None:
    """Values of ``cu_seqlens``: from 0 to T without a step back."""
    if cu_seqlens is None or not checks_values(cu_seqlens):
        return
    marks = cu_seqlens.tolist()
    expect(
        marks[0] == 0 and marks[-1] == tokens and marks == sorted(marks),
        "cu_seqlens",
        marks if len(marks) < 9 else f"{marks[:4]} … {marks[-2:]}",
        f"non-decreasing offsets from 0 to T = {tokens}",
    )


def check_index(name: str, index: Tensor | None, size: int | None) -> None:
    """Values of an index: in ``[0, size)``."""
    if index is None or size is None or index.numel() == 0 or not checks_values(index):
        return
    low, high = (int(x) for x in index.aminmax())
    expect(low >= 0 and high < size, name, f"{low} to {high}", f"values in [0, {size})")
