"""Ops on the PTX machine, and what they are judged by."""

from __future__ import annotations

import os

import pytest
import torch

from mal_kernels import MemoryState, ops, reference
from mal_kernels.testing import (
    assert_all_within_budget,
    assert_parity,
    low_precision,
    make_inputs,
)
from mal_kernels.testing.emulation import needs_compiler
from tests.support.cuda import scan, scan_tensors, turn, values_and_gradients

needs_compiler()
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles: runs without TRITON_INTERPRET", allow_module_level=True)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def judge(function, golden, tensors, dtype):
    """Values and gradients of ``function(**tensors)`` within the budget around the golden."""
    high = values_and_gradients(golden, {n: t.double() for n, t in tensors.items()})
    twin = None
    if dtype != F32:
        with low_precision(dtype):
            twin = values_and_gradients(golden, {n: t.float() for n, t in tensors.items()})
    assert_all_within_budget(values_and_gradients(function, tensors), high, twin, dtype)


def check_memory(backend, dtype=F32, **case):
    """The layer, forward and backward; without queries where ``reads`` is False."""

    def layer(*args, **options):
        return ops.neural_memory(*args, **options, backend=backend)

    inputs = make_inputs(**(dict(batch=1, heads=1) | case), dtype=dtype)
    if dtype != F32:  # float16 would lose the gradients of gates
        gates = (None if gate is None else gate.float() for gate in inputs[3:6])
        inputs = inputs._make([*inputs[:3], *gates, *inputs[6:]])
    assert_parity(layer, inputs)


def check_read(backend, dtype=F32, **case):
    """The read of a memory, forward and backward."""
    inputs = make_inputs(**(dict(batch=1, heads=1) | case))
    names = ("activation", "residual_norm", "cu_seqlens")
    options = {name: inputs.options.get(name) for name in names}
    tensors = {"q": inputs.q.to(dtype)}
    tensors |= {f"w{i}": w.float() for i, w in enumerate(inputs.state.weights)}

    def read(function, **more):
        def call(q, **weights):
            state = MemoryState(tuple(weights.values()), tuple(weights.values()))
            return [function(q, state, **options, **more)]

        return call

    judge(read(ops.memory_read, backend=backend), read(reference.memory_read), tensors, dtype)


def check_scan(backend, dtype=F32, **case):
    """The bare scan, forward and backward."""
    tensors, options = scan_tensors(**case)
    tensors["update"] = tensors["update"].to(dtype)
    judge(
        scan(ops.momentum_scan, backend=backend, **options),
        scan(reference.momentum_scan, **options),
        tensors,
        dtype,
    )


def check_aligned(backend, dtype=BF16, gradients=True, **case):
    """The read into a host's hidden states; forward alone without ``gradients``."""
    given = turn(dtype, **case)
    tensors = {"hidden": given["hidden"]}
    tensors |= {f"w{i}": w for i, w in enumerate(given["weights"])}
    tensors |= {f"p{i}": p for i, p in enumerate(given["params"])}
    depth = len(given["weights"])

    def aligned(function, **more):
        def call(hidden, **rest):
            weights, params = [*rest.values()][:depth], [*rest.values()][depth:]
            index = (given["token_index"], given["state_index"])
            state = MemoryState(tuple(weights), tuple(weights))
            params = ops.ReadParams(*params)
            return [function(hidden, *index, state, params, **given["options"], **more)]

        return call

    function = aligned(ops.aligned_residual_read, backend=backend)
    golden = aligned(reference.aligned_residual_read)
    if gradients:
        judge(function, golden, tensors, dtype)
        return
    with torch.no_grad():
        high = golden(**{n: t.double() for n, t in tensors.items()})[0]
        with low_precision(dtype):
            twin = golden(**{n: t.float() for n, t in tensors.items()})[0]
        found = function(**tensors)[0]
    assert_all_within_budget({"hidden": found}, {"hidden": high}, {"hidden": twin}, dtype)
