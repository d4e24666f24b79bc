"""The CUDA kernels within the budgets of the reference: emulated on the host, or on a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mal_kernels import BackendUnavailable, ops, reference
from mal_kernels._cuda import neural_memory
from mal_kernels.call import MemoryCall
from mal_kernels.testing import assert_within_budget, closed_form, low_precision
from mal_kernels.testing.emulation import devices
from tests.support.cuda import (
    CASES,
    called,
    memory_inputs,
    scan,
    scan_tensors,
    values_and_gradients,
    written,
)


def every_case_and_dtype(cases, dtypes, few):
    """All cases in the first dtype, and the `few` in the others."""
    return [(case, dtypes[0]) for case in cases] + [(c, d) for d in dtypes[1:] for c in few]


device = devices("momentum_scan.cu", "neural_memory_fwd.cu")


# --- momentum_scan --------------------------------------------------------------------------------

SCANS = {
    "a group in time, vectors": dict(features=(256,), tokens=21),  # 128 threads take 512
    "three blocks of features": dict(features=(33, 32), tokens=11),
    "two groups, odd features": dict(features=(5, 45), tokens=37),
    "32 groups, one feature": dict(features=(), tokens=600, heads=1),
    "no state": dict(state=False),
    "no momentum": dict(gates=("decay",)),
    "no decay": dict(gates=("momentum",)),
    "bare": dict(gates=(), state=False),
    "gates of 0 and 1": dict(edges=True, features=(20,)),
    "ragged": dict(lengths=[5, 0, 70, 1], features=(64,)),
    "no tokens": dict(tokens=0),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    every_case_and_dtype(
        SCANS,
        [torch.float32, torch.bfloat16, torch.float16],
        ["two groups, odd features", "a group in time, vectors", "ragged"],
    ),
)
def test_momentum_scan(case, dtype, device):
    tensors, options = scan_tensors(**SCANS[case])
    low = {
        n: t.to(dtype) if n in ("update", "momentum", "decay") else t for n, t in tensors.items()
    }
    actual = values_and_gradients(scan(ops.momentum_scan, device, backend="cuda", **options), low)
    high = {n: t.double() for n, t in low.items()}
    golden = values_and_gradients(scan(reference.momentum_scan, **options), high)
    for name, x in actual.items():
        # no product of matrices: the twin of a low precision is the golden itself
        twin = golden[name] if x.dtype != torch.float32 else None
        gradient = name.startswith("grad")
        assert_within_budget(name, x, golden[name], gradient=gradient, twin=twin, dtype=dtype)


def test_momentum_scan_of_unaligned_memory(device):
    update = torch.randn(1 + 2 * 9 * 1 * 64, device=device)[1:].view(2, 9, 1, 64)
    assert update.data_ptr() % 16
    gate = torch.rand(2, 9, 1, device=device)
    inputs = (update, gate, gate)
    expected = ops.momentum_scan(*inputs, backend="reference")
    for x, y in zip(ops.momentum_scan(*inputs, backend="cuda"), expected, strict=True):
        torch.testing.assert_close(x, y)


# --- neural_memory and memory_update --------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    every_case_and_dtype(
        CASES,
        [torch.bfloat16, torch.float16],
        ["token steps", "norm, clip, odd sizes", "128 features, four blocks"],
    ),
)
def test_neural_memory_and_memory_update(case, dtype, device):
    inputs = memory_inputs(dtype, **CASES[case])
    actual = called(ops.neural_memory, inputs, device, backend="cuda")
    golden = called(reference.recurrence, inputs.to(torch.float64))
    with low_precision(dtype):
        twin = called(closed_form, inputs.to(torch.float32))
    assert actual.keys() == golden.keys()
    for name, x in actual.items():
        assert_within_budget(name, x, golden[name], twin=twin[name], dtype=dtype)
    # to the bit, whether it reads or not
    for name, x in written(ops.memory_update, inputs, device, backend="cuda").items():
        assert torch.equal(x, actual[name]), name


def parts_of(inputs, *marks):
    """The arguments cut along T before each of ``marks``, without the state."""
    *tokens, _, options = inputs
    marks = (0, *marks, tokens[0].shape[1])
    return [([x[:, a:b] for x in tokens], options) for a, b in pairwise(marks)]


@pytest.mark.parametrize("marks", [(64, 128), (1, 40, 101)])
def test_a_stream_cut_anywhere_is_the_whole(marks, device):
    inputs = memory_inputs(tokens=130, chunk_size=128, heads=1, residual_norm=True)
    whole = called(ops.neural_memory, inputs, device, backend="cuda")
    state, outputs = inputs.state, []
    for tokens, options in parts_of(inputs, *marks):
        with torch.no_grad():
            given = [x.to(device) for x in tokens]
            state = state.map(lambda x: x.to(device))
            out = ops.neural_memory(*given, state, **options, backend="cuda")
        state = out.state
        outputs.append(out.output.cpu())
    parts = {"output": torch.cat(outputs, 1), "weights[0]": state.weights[0].cpu()}
    if marks == (64, 128):  # the same tiles: the state goes through memory and nothing is lost
        assert all(torch.equal(x, whole[name]) for name, x in parts.items())
        return
    golden = called(reference.recurrence, inputs.to(torch.float64))
    for name, x in parts.items():
        twin = whole[name]  # within the budget of Tier 1, as the whole is
        assert_within_budget(name, x, golden[name], twin=twin, dtype=torch.bfloat16)


@pytest.mark.parametrize("step", ["token", "chunk"])
def test_what_comes_later_changes_no_output(step, device):
    # from the seventh token of a chunk's second tile on
    inputs = memory_inputs(tokens=140, chunk_size=130, heads=1, step=step, max_grad_norm=1.0)
    before = called(ops.neural_memory, inputs, device, backend="cuda")["output"]
    for x in inputs[:4]:
        x[:, 70:] = x[:, 70:].flip(1)
    after = called(ops.neural_memory, inputs, device, backend="cuda")["output"]
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70], after[:, 70])


def test_states_before_tiles(device):
    # four tiles, in the slots from 1 on; a chunk ends after the third
    inputs = memory_inputs(tokens=140, chunk_size=130, heads=1, residual_norm=True)
    given = inputs.map(lambda x: x.to(device))
    tiles = [[w.new_full((6, *w.shape[1:]), 7.0) for w in x] for x in given.state[:2]]
    first = torch.ones(1, dtype=torch.int64, device=device)
    call = MemoryCall.of(given[:6], given.state, **given.options)
    neural_memory.memory_fwd(call, keeps=True, tiles=(*tiles, first))
    for slot, tokens in [(1, 0), (2, 64), (3, 128), (4, 130)]:
        cut = [x[:, :tokens] for x in inputs[:6]]
        before = written(ops.memory_update, (*cut, *inputs[6:]), device, backend="cuda")
        for i, (w, trace) in enumerate(zip(*tiles, strict=True)):
            assert torch.equal(w[slot].cpu(), before[f"weights[{i}]"][0])
            assert torch.equal(trace[slot].cpu(), before[f"momentum[{i}]"][0])
    assert all((w[[0, 5]] == 7).all() for x in tiles for w in x)


def test_the_same_bits_twice(device):
    inputs = memory_inputs(tokens=70, hidden=128, chunk_size=32, max_grad_norm=0.5)
    first, second = (called(ops.neural_memory, inputs, device, backend="cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


UNSERVED = {
    "float32": (dict(dtype=torch.float32), "takes float16 and bfloat16 tokens, not torch.float32"),
    "features": (dict(head_dim=20), "not depth 2, 20 features, 64 units"),
    "width": (dict(head_dim=128, hidden=513), "up to 512 hidden units; not"),
    "depth": (dict(depth=3), "not depth 3"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_writes_that_the_kernel_cannot_serve_are_refused(case, device):
    sizes, message = UNSERVED[case]
    with pytest.raises(BackendUnavailable, match=message):
        written(ops.memory_update, memory_inputs(**sizes), device, backend="cuda")


# --- what is refused everywhere -------------------------------------------------------------------


def test_what_the_kernels_cannot_serve_is_refused(device):
    with pytest.raises(BackendUnavailable, match="float64 is served by the reference"):
        ops.momentum_scan(torch.ones(1, 2, 1, device=device).double(), None, None, backend="cuda")


def test_tensors_must_be_on_a_gpu():
    with pytest.raises(BackendUnavailable, match="run on NVIDIA GPUs and the tensors are on cpu"):
        ops.momentum_scan(torch.ones(1, 2, 1), None, None, backend="cuda")
