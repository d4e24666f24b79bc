"""Triton's kernels, compiled for a GPU and executed from their PTX, against the definition."""

from __future__ import annotations

import pytest

from tests.support.ptx import (
    BF16,
    F16,
    F32,
    check_aligned,
    check_memory,
    check_read,
    check_scan,
)

pytest.importorskip("triton", reason="triton is not installed")

from mal_kernels._triton import aot
from mal_kernels.testing.ptx.machine import Schedule
from mal_kernels.testing.ptx.triton import executing

pytestmark = pytest.mark.timeout(1800)  # of a busy machine
SCHEDULES = [Schedule("early", 1), Schedule("late", 2), Schedule("mixed", 3)]
EVERYTHING = dict(lengths=[5, 0, 20], position=True, init=True, max_grad_norm=0.5)
WHOLE = dict(EVERYTHING, chunk_size=16)
SOME = dict(tokens=140, hidden=40)
INSIDE = dict(batch=2, tokens=1, chunk_size=8, position=True)

# One call for every entry of EXAMPLES: of its kind (features, dtype, options), but few tokens,
# heads and hidden units.
EXAMPLES = {
    "neural_memory": {
        "D64 E256 chunk 64 bf16": (BF16, dict(tokens=260, chunk_size=64, head_dim=64, hidden=64)),
        "D64 E128 turn ragged bf16": (
            BF16,
            dict(lengths=[30, 0, 17], chunk_size=None, step="chunk", head_dim=64, hidden=64,
                 init=True, max_grad_norm=1.0),
        ),
        "D64 E256 norm, all options, bf16": (
            BF16, dict(EVERYTHING, lengths=[3, 0, 260], chunk_size=64, head_dim=64, hidden=64,
                       residual_norm=True),
        ),
        "D64 E256 norm, all options, chunk 32 bf16": (
            BF16, dict(EVERYTHING, lengths=[3, 0, 260], chunk_size=32, head_dim=64, hidden=64,
                       residual_norm=True),
        ),
        "D128 E512, all options, bf16": (
            BF16, dict(WHOLE, head_dim=128, hidden=64),
        ),
        "D128 E512 norm, all options, fp32": (
            F32, dict(WHOLE, head_dim=128, hidden=40, residual_norm=True),
        ),
        "D16 E64, all options, fp32": (F32, dict(WHOLE, head_dim=16, hidden=40)),
        "D256 depth 1, all options, fp32": (
            F32, dict(WHOLE, head_dim=256, depth=1),
        ),
    },
    "decode": {
        "D64 E256 bf16": (BF16, dict(INSIDE, head_dim=64, hidden=40)),
        "D64 E128 clipped bf16": (
            BF16, dict(tokens=1, head_dim=64, hidden=40, chunk_size=8, max_grad_norm=1.0),
        ),
        "D128 E512 norm bf16": (
            BF16, dict(INSIDE, head_dim=128, hidden=40, residual_norm=True, max_grad_norm=1.0),
        ),
        "D64 E256 norm fp32": (
            F32, dict(INSIDE, head_dim=64, hidden=40, residual_norm=True),
        ),
        "depth 1 D256 bf16": (BF16, dict(tokens=1, head_dim=256, depth=1, chunk_size=8)),
    },
    "memory_read": {
        "D64 E128 bf16 turn ragged": (BF16, dict(lengths=[70, 3, 30], head_dim=64, hidden=40)),
        "D64 E256 bf16": (BF16, dict(tokens=300, head_dim=64, hidden=64)),
        "D128 E512 bf16 norm": (BF16, dict(SOME, head_dim=128, residual_norm=True)),
        "D128 E512 fp32 norm": (F32, dict(tokens=20, head_dim=128, hidden=40, residual_norm=True)),
        "depth 1 D256 bf16": (BF16, dict(tokens=140, head_dim=256, depth=1)),
        "depth 1 D256 fp32": (F32, dict(tokens=20, head_dim=256, depth=1)),
    },
    "momentum_scan": {
        "F8192 fp32": (F32, dict(features=(10, 13))),
        "F64 bf16 ragged": (BF16, dict(features=(64,), lengths=[5, 0, 40])),
        "F8192 bf16 no gates": (BF16, dict(features=(520,), gates=(), tokens=9, heads=1)),
        "F1 fp32": (F32, dict(features=(), tokens=300, heads=1)),
    },
    "aligned_residual_read": {
        "Dm4096 D64 E128 bf16 turn": (BF16, dict(width=96, dim=64, hidden=40)),
        "Dm3584 D64 E256 bf16 norm": (BF16, dict(dim=64, hidden=40, residual_norm=True)),
        "Dm4096 D128 E512 fp16": (F16, dict(heads=1, dim=128, hidden=40)),
        "Dm1024 D128 depth 1 bf16": (BF16, dict(heads=1, dim=128, depth=1)),
        "Dm1024 D64 E128 fp32": (F32, dict(width=40, dim=64, hidden=40)),
    },
}  # fmt: skip
OTHERS = {
    "neural_memory": {
        "a chunk of several tiles": (F32, dict(tokens=37, chunk_size=None, init=True)),
        "a chunk longer than is walked": (F32, dict(tokens=140, chunk_size=130)),
        "gates of 0 and 1": (F32, dict(batch=3, tokens=9, chunk_size=6, position=True, edges=True)),
        "ragged, fp16": (F16, dict(lengths=[1, 6], chunk_size=4, residual_norm=True, edges=True)),
        "linear, norm, clip": (
            BF16, dict(tokens=11, chunk_size=4, depth=1, residual_norm=True, init=True,
                       max_grad_norm=0.3),
        ),
        "no gates": (F32, dict(tokens=11, chunk_size=4, gates=False)),
        "chunk steps, norm": (
            F32, dict(tokens=11, chunk_size=4, step="chunk", residual_norm=True, max_grad_norm=0.1),
        ),
    },
}  # fmt: skip
CHECKS = {
    "neural_memory": check_memory,
    "decode": check_memory,
    "memory_read": check_read,
    "momentum_scan": check_scan,
    "aligned_residual_read": check_aligned,
}
# a few that `make test` compiles, by target
FAST = {
    ("sm_90", "memory_read", "D64 E256 bf16"),
    ("sm_80", "momentum_scan", "F64 bf16 ragged"),
}


def calls(table, target):
    for op, cases in table.items():
        for name in cases:
            slow = [] if (target, op, name) in FAST else [pytest.mark.slow]
            yield pytest.param(target, op, name, marks=slow)


@pytest.mark.parametrize(
    ("target", "op", "name"),
    [c for target in ("sm_80", "sm_90") for t in (EXAMPLES, OTHERS) for c in calls(t, target)],
)
def test_parity(target, op, name):
    dtype, sizes = (EXAMPLES[op] | OTHERS.get(op, {}))[name]
    # another schedule for each, the same in every run
    schedule = SCHEDULES[(len(name) + len(target)) % len(SCHEDULES)]
    with executing(target, schedule=schedule) as outcomes:
        CHECKS[op]("triton", dtype, **sizes)
    assert outcomes


def test_every_example_is_executed():
    modules = aot.kernel_modules()
    named = {
        name: [*module.EXAMPLES] for name, module in modules.items() if hasattr(module, "EXAMPLES")
    }
    assert {op: [*cases] for op, cases in EXAMPLES.items()} == named


# between them they launch every kernel
ALL = {
    "neural_memory": (
        *("D16 E64, all options, fp32", "a chunk of several tiles"),
        *("a chunk longer than is walked", "chunk steps, norm"),
    ),
    "decode": ("D64 E256 bf16",),
    "memory_read": ("D64 E128 bf16 turn ragged",),
    "momentum_scan": ("F1 fp32",),
    "aligned_residual_read": ("Dm1024 D64 E128 fp32",),
}


@pytest.mark.slow
def test_every_kernel_is_executed():
    ran = set()
    for op, names in ALL.items():
        for name in names:
            dtype, sizes = (EXAMPLES[op] | OTHERS.get(op, {}))[name]
            with executing("sm_90", checks=False) as outcomes:
                CHECKS[op]("triton", dtype, **sizes)
            ran |= {outcome.kernel for outcome in outcomes}
    assert ran == set().union(*map(aot.kernels_of, aot.kernel_modules().values()))
