"""The interpreter shim: right where it must be right, and it sees every planted bug."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in the interpreter process: TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from mal_kernels.testing import interpreter

interpreter.install()

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


# --- numbers --------------------------------------------------------------------------------------


@triton.jit
def arithmetic_kernel(p_x, p_y, p_out, N: tl.constexpr):
    """x · y + x, rounded after each operation"""
    o = tl.arange(0, N)
    b_x = tl.load(p_x + o)
    tl.store(p_out + o, b_x * tl.load(p_y + o) + b_x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arithmetic_rounds_like_torch(dtype):
    x, y = torch.randn(2, 1024).to(dtype)
    out = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, out, 1024)
    assert torch.equal(out, x * y + x)


@triton.jit
def copy_kernel(p_x, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_x + o).to(p_out.dtype.element_ty))


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_casts_round_to_nearest_even(source, target):
    edges = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3e38]
    )
    x = torch.cat([torch.randn(1016), edges]).to(source)
    out = torch.empty(1024, dtype=target)
    copy_kernel[(1,)](x, out, 1024)
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0, equal_nan=True)


@triton.jit
def dot_kernel(p_a, p_b, p_out, N: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)
    b_out = tl.dot(tl.load(p_a + o), tl.load(p_b + o), input_precision=PRECISION)
    tl.store(p_out + o, b_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dot_accumulates_in_float32(dtype):
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, 32, "ieee")
    torch.testing.assert_close(out, a.float() @ b.float())


def test_dot_rounds_tf32():
    a, b = torch.randn(2, 32, 32)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, 32, "tf32")
    error = (out - a @ b).norm() / out.norm()
    assert 1e-5 < error < 1e-3


@triton.jit
def first_order(a, x, b, y):
    return a * b, b * x + y


@triton.jit
def scan_kernel(p_a, p_x, p_out, N: tl.constexpr, REVERSE: tl.constexpr):
    o = tl.arange(0, N)
    pair = (tl.load(p_a + o), tl.load(p_x + o))
    tl.store(p_out + o, tl.associative_scan(pair, 0, first_order, reverse=REVERSE)[1])


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_of_a_pair(reverse):
    a, x, out = torch.rand(64), torch.randn(64), torch.empty(64)
    scan_kernel[(1,)](a, x, out, 64, reverse)
    expected, y = torch.zeros(64), 0.0
    for t in range(63, -1, -1) if reverse else range(64):
        y = expected[t] = a[t] * y + x[t]
    torch.testing.assert_close(out, expected)


@triton.jit
def loop_kernel(p_out, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(p_out, total)


def test_loop_to_a_runtime_bound():
    out = torch.zeros(1, dtype=torch.int32)
    loop_kernel[(1,)](out, 5)
    assert out.item() == 10


# --- planted bugs ---------------------------------------------------------------------------------


@triton.jit
def masked_copy_kernel(p_x, p_out, n_load, n_store, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_x + o, mask=o < n_load, other=0.0), mask=o < n_store)


@pytest.mark.parametrize(("load", "store", "fault"), [(25, 24, "load"), (24, 25, "store")])
def test_mask_off_by_one_is_seen(load, store, fault):
    x, out = torch.ones(24), torch.ones(24)
    masked_copy_kernel[(2,)](x, out, 24, 24, 16)
    with pytest.raises(InterpreterError, match=f"MemoryFault.*{fault}"):
        masked_copy_kernel[(2,)](x, out, load, store, 16)


@triton.jit
def pair_kernel(pair, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(pair[1] + o, tl.load(pair[0] + o))


def test_tensors_in_tuples_are_checked_too():
    x, out = torch.ones(16), torch.zeros(16)
    pair_kernel[(1,)]((x, out), 16)
    assert torch.equal(out, x)
    with pytest.raises(InterpreterError, match="MemoryFault"):
        pair_kernel[(1,)]((x[:15].clone(), out), 16)


@triton.jit
def neighbour_kernel(p_buffer, p_out, N: tl.constexpr):
    """reads what the program before it stores"""
    i = tl.program_id(0)
    tl.store(p_buffer + i, i)
    tl.store(p_out + i, tl.load(p_buffer + (i + N - 1) % N))


@triton.jit
def shift_kernel(p_x, p_out, N: tl.constexpr):
    """in place: stores where another program has read"""
    i = tl.program_id(0)
    tl.store(p_x + i, tl.load(p_x + (i + 1) % N))


@triton.jit
def accumulate_kernel(p_x, p_out, N: tl.constexpr):
    """every program adds to one cell, without an atomic"""
    tl.store(p_out, tl.load(p_out) + tl.load(p_x + tl.program_id(0)))


@triton.jit
def overlap_kernel(p_x, p_out, N: tl.constexpr):
    """tiles of two, one apart"""
    tl.store(p_out + tl.program_id(0) + tl.arange(0, 2), tl.program_id(0))


@pytest.mark.parametrize(
    "kernel", [neighbour_kernel, shift_kernel, accumulate_kernel, overlap_kernel]
)
def test_races_are_seen(kernel):
    with pytest.raises(InterpreterError, match="Race"):
        kernel[(8,)](*torch.zeros(2, 9, dtype=torch.int32), 8)


@triton.jit
def atomic_kernel(p_x, p_out, N: tl.constexpr):
    tl.atomic_add(p_out, tl.load(p_x + tl.program_id(0)))


def test_atomics_are_no_race():
    out = torch.zeros(1, dtype=torch.int32)
    atomic_kernel[(8,)](torch.ones(8, dtype=torch.int32), out, 8)
    assert out.item() == 8


def test_race_check_can_be_left_out():
    with interpreter.unchecked_races():
        neighbour_kernel[(8,)](*torch.zeros(2, 9, dtype=torch.int32), 8)
    with pytest.raises(InterpreterError, match="Race"):
        neighbour_kernel[(8,)](*torch.zeros(2, 9, dtype=torch.int32), 8)


@triton.jit
def not_associative(x, y):
    return 0.5 * x + y


@triton.jit
def wrong_scan_kernel(p_x, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.associative_scan(tl.load(p_x + o), 0, not_associative))


@triton.jit
def wrong_reduce_kernel(p_x, p_out, N: tl.constexpr):
    tl.store(p_out, tl.reduce(tl.load(p_x + tl.arange(0, N)), 0, not_associative))


def test_a_function_that_is_not_associative_is_wrong():
    x, out, y = torch.randn(32), torch.empty(32), 0.0
    for v in x.tolist():
        y = 0.5 * y + v
    for kernel, last in ((wrong_scan_kernel, -1), (wrong_reduce_kernel, 0)):
        kernel[(1,)](x, out, 32)
        assert abs(out[last] - y) > 1e-2


@triton.jit
def assert_kernel(p_x):
    tl.device_assert(tl.load(p_x) > 0, "not positive")


def test_device_assert_is_evaluated():
    assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(InterpreterError, match="not positive"):
        assert_kernel[(1,)](-torch.ones(1))


@triton.jit
def address_kernel(p_x, p_out, stride):
    i = tl.program_id(0)
    tl.store(p_out + i, i * stride)


def test_int32_overflow_is_seen():
    with pytest.raises(InterpreterError, match="overflow"):
        address_kernel[(3,)](torch.zeros(1), torch.zeros(3, dtype=torch.int32), 2**30 + 1)


def test_dot_below_a_tensor_core_is_refused():
    with pytest.raises(InterpreterError, match=r"(?i)dot|shape"):
        dot_kernel[(1,)](*torch.randn(3, 8, 8), 8, "ieee")


BFLOAT16 = """
import torch
from mal_kernels import MemoryState, ops
q, weights = torch.ones(1, 3, 1, 8, dtype=torch.bfloat16), (torch.ones(1, 1, 8, 8),) * 2
try:
    ops.memory_read(q, MemoryState.from_weights(weights), backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_bfloat16_is_refused_where_the_interpreter_is_not_repaired():
    done = subprocess.run(
        [sys.executable, "-c", BFLOAT16], check=True, capture_output=True, text=True
    )
    assert (
        "computes bfloat16 wrongly; call mal_kernels.testing.interpreter.install()" in done.stdout
    )
