"""Argument checks shared by the ops: shapes and types, then values (see :func:`checks_values`)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor

from .._native.packing import BadValues
from ..call import chunk_counts
from ..errors import ArgumentError
from ..network import ACTIVATIONS
from ..state import MemoryState

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


Check = TypeVar("Check", bound=Callable[..., Any])
T = TypeVar("T")


def once_per_kind(check: Check) -> Check:
    """Makes ``check``, which looks at no values, one comparison for arguments as they were before.

    A kind is shapes, dtypes and devices, and what is no tensor. What was raised is not kept.
    """
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(check)
    def checked(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return check(*arguments)
        kind = tuple([_kind(x) for x in arguments])
        try:
            return known[kind]
        except TypeError:  # not hashable: of no use to compare, or wrong
            return check(*arguments)
        except KeyError:
            result = check(*arguments)
        if len(known) >= 256:
            known.clear()
        known[kind] = result
        return result

    return cast(Check, checked)


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    return (type(x), *[_kind(y) for y in x]) if isinstance(x, (tuple, list)) else (type(x), x)


def with_good_values(backend: str, check: Callable[[], None], run: Callable[[], T]) -> T:
    """Returns what ``run`` computes of values that ``check`` does not raise for.

    The kernels of the CPU look at values as they read them: there ``check`` only says what it was.
    """
    if backend != "cpu":
        check()
    try:
        return run()
    except BadValues:
        check()
        raise


def expect(ok: bool, name: str, got: object, expected: str, remedy: str = "") -> None:
    """Raises ArgumentError naming the argument, what it was, what was expected and what to do.

    ``got`` is that in words, or a value for :func:`describe`, which is called only if it is wrong:
    words cost time, and ``torch.compile`` cannot format a number that it keeps dynamic.
    """
    if not ok:
        tail = f"; {remedy}" if remedy else ""
        what = got if isinstance(got, str) else describe(got)
        raise ArgumentError(f"{name}: got {what}, expected {expected}{tail}")


def describe(x: object) -> str:
    """Dtype, shape and device of a tensor; the type, and if it is short the value, of others."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)} on {x.device}"
    # a state would print its tensors
    short = x is None or isinstance(x, (bool, int, float, str, torch.dtype, torch.device))
    return f"{type(x).__name__} {x!r}"[:80] if short else type(x).__name__


def is_float(x: object) -> TypeGuard[Tensor]:
    """Whether ``x`` is a tensor of a dtype that the ops know."""
    return isinstance(x, Tensor) and x.dtype in FLOATS


def check_tokens(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """``[B, T, H, D]`` floating point; same shape, dtype and device as ``like``."""
    expect(isinstance(x, Tensor), name, x, "a tensor [B, T, H, D]")
    expect(x.ndim == 4, name, f"shape {list(x.shape)}", "4 dimensions [B, T, H, D]")
    expect(x.dtype in FLOATS, name, x.dtype, "a floating point dtype", "cast it first")
    if like is not None:
        expect(
            x.shape == like.shape and x.dtype == like.dtype and x.device == like.device,
            name,
            x,
            f"{describe(like)} like the other tokens",
        )


def check_gate(name: str, gate: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """A gate of ``shape``; momentum and decay may be None."""
    if gate is None and name != "lr":
        return
    expect(
        is_float(gate) and tuple(gate.shape) == tuple(shape) and gate.device == device,
        name,
        gate,
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


def check_write_options(step: str, chunk_size: int | None, max_grad_norm: float | None) -> None:
    """How a write is done."""
    expect(step in ("token", "chunk"), "step", repr(step), "'token' or 'chunk'")
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    expect(
        chunk_size is None or (whole and 1 <= chunk_size < 2**63),
        "chunk_size",
        chunk_size,
        "an int of at least 1, or None",
    )
    number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
    expect(
        max_grad_norm is None or (number and 1e-18 <= max_grad_norm <= 1e18),  # float32 squares
        "max_grad_norm",
        max_grad_norm,
        "a number from 1e-18 to 1e18, or None",
    )


def check_chunk_gates(
    cu_seqlens: Tensor | None, chunk_size: int | None, **gates: Tensor | None
) -> None:
    """Ragged chunk steps: one gate per chunk of every sequence, at least one a sequence."""
    if cu_seqlens is None or chunk_size is None or not checks_values(cu_seqlens):
        return
    n = int(chunk_counts(cu_seqlens.diff(), chunk_size).sum())
    for name, gate in gates.items():
        if gate is not None:
            expect(gate.shape[1] == n, name, f"{gate.shape[1]} chunks", f"{n} for cu_seqlens")


def check_memory(
    state: MemoryState, tokens: Tensor, rows: int, residual_norm: bool, activation: str
) -> None:
    """The state fits ``tokens`` ``[B, T, H, D]`` and ``rows`` sequences."""
    known = isinstance(activation, str) and activation in ACTIVATIONS
    expect(known, "activation", activation, f"one of {[*ACTIVATIONS]}")
    expect(isinstance(residual_norm, bool), "residual_norm", residual_norm, "a bool")
    check_fields(state)
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
    if state.position is not None:
        position = state.position
        good = isinstance(position, Tensor) and position.dtype == torch.int64
        expect(
            good and position.shape == (rows,) and position.device == tokens.device,
            "state.position",
            position,
            f"int64 [{rows}] on {tokens.device}",
        )


def check_fields(state: MemoryState) -> None:
    """A MemoryState with a tuple or list of tensors in every field that has some."""
    expect(isinstance(state, MemoryState), "state", state, "a MemoryState")
    for name, field in zip(state._fields[:3], state, strict=False):
        if field is not None or name != "anchor":
            good = isinstance(field, (tuple, list)) and all(is_float(x) for x in field)
            expect(good, f"state.{name}", field, "a floating point tensor per layer")


def check_state_tensor(
    name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    expect(
        is_float(x) and tuple(x.shape) == tuple(shape) and x.dtype == dtype and x.device == device,
        name,
        x,
        f"{dtype} {list(shape)} on {device}",
        "a state belongs to one memory size; state is float32 (float64 for float64 tokens)",
    )


def check_like_weights(name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """One tensor per layer with the shape, dtype and device of the weights."""
    expect(isinstance(tensors, (tuple, list)), name, tensors, "a tensor per layer")
    expect(
        len(tensors) == len(weights), name, f"{len(tensors)} tensors", f"{len(weights)}, per layer"
    )
    for i, (x, w) in enumerate(zip(tensors, weights, strict=True)):
        check_state_tensor(f"{name}[{i}]", x, w.shape, w.dtype, w.device)


def check_cu_seqlens(cu_seqlens: Tensor | None, tokens: Tensor) -> int:
    """Returns the number of sequences."""
    if cu_seqlens is None:
        return tokens.shape[0]
    expect(isinstance(cu_seqlens, Tensor), "cu_seqlens", cu_seqlens, "a tensor, or None")
    expect(
        tokens.shape[0] == 1,
        "cu_seqlens",
        f"given with B = {tokens.shape[0]}",
        "B = 1 with all sequences one after another along T",
    )
    expect(
        cu_seqlens.ndim == 1
        and len(cu_seqlens) >= 2
        and cu_seqlens.dtype in (torch.int32, torch.int64)
        and cu_seqlens.device == tokens.device,
        "cu_seqlens",
        cu_seqlens,
        f"int32 or int64 [N + 1] on {tokens.device}",
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
    if index.device.type == "cpu" and index.numel() <= 64:
        values = index.tolist()  # faster than asking torch
        low, high = min(values), max(values)
    else:
        low, high = (int(x) for x in index.aminmax())
    expect(low >= 0 and high < size, name, f"{low} to {high}", f"values in [0, {size})")
