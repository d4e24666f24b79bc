"""One token a row: the kernel that writes and reads it in one launch.

Its gradients are those of the other kernels, which test_triton_neural_memory.py covers.
"""

from __future__ import annotations

import pytest
import torch

from mal_kernels import ops, reference
from mal_kernels.call import MemoryCall
from mal_kernels.testing import closed_form, make_inputs
from tests.support.parity import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    assert_same,
    counted_launches,
    moved,
    on_tensors,
    values,
)

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

ONE = dict(batch=3, heads=2, tokens=1, chunk_size=4)
CASES = {
    "at a boundary": ONE,
    "inside a chunk": dict(ONE, position=True),
    "norm, clipped": dict(ONE, position=True, residual_norm=True, max_grad_norm=0.3, init=True),
    "linear": dict(ONE, depth=1, head_dim=20, position=True, init=True),
    "linear, norm": dict(ONE, depth=1, residual_norm=True, max_grad_norm=0.2),
    "several slices": dict(ONE, head_dim=20, hidden=70, max_grad_norm=0.5, activation="silu"),
    "no gates": dict(ONE, gates=False, position=True, activation="relu"),
    "edges": dict(ONE, batch=8, edges=True, init=True, activation="gelu_tanh"),
    "chunks of one": dict(ONE, chunk_size=1),
    "one call, one chunk": dict(ONE, chunk_size=None),
    "chunk step": dict(ONE, step="chunk", residual_norm=True, init=True),
}


@pytest.fixture(autouse=True)
def _is_served_by_the_kernel(monkeypatch):
    """Whatever a test here finds, it is about this kernel."""
    from mal_kernels._triton import neural_memory

    called = []
    stock = neural_memory.decode_fwd
    monkeypatch.setattr(
        neural_memory, "decode_fwd", lambda *a, **k: called.append(1) or stock(*a, **k)
    )
    yield
    assert called


def triton(inputs):
    return on_tensors(ops.neural_memory, inputs, backend="triton")


@pytest.mark.parametrize("case", CASES)
def test_parity(case):
    inputs = make_inputs(dtype=torch.float32, **CASES[case])
    inputs = inputs._replace(state=inputs.state.to(DEVICE)).map(lambda t: t.to(DEVICE))
    golden = on_tensors(reference.recurrence, inputs)
    assert_same(triton(inputs), golden, inputs.tensors(), torch.float32, values)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ["norm, clipped", "chunk step"])
def test_parity_of_half_precision(case, dtype):
    inputs = make_inputs(dtype=dtype, **CASES[case])
    inputs = inputs._replace(state=inputs.state.to(DEVICE)).map(lambda t: t.to(DEVICE))
    # the twin rounds what the matrix products of the closed form are given
    golden = on_tensors(closed_form, inputs)
    assert_same(triton(inputs), golden, inputs.tensors(), dtype, values)


@pytest.mark.parametrize("step", ["token", "chunk"])
def test_decoding_is_prefill(step):
    case = dict(batch=1, heads=1, tokens=5, residual_norm=True, init=True, step=step)
    case["chunk_size"] = 3 if step == "token" else 1
    *args, state, options = moved(make_inputs(dtype=torch.float32, **case), DEVICE)
    whole = ops.neural_memory(*args, state, **options, backend="triton")
    outputs, surprises = [], []
    for t in range(5):
        token = (x[:, t : t + 1] for x in args)
        output, state, surprise = ops.neural_memory(*token, state, **options, backend="triton")
        outputs.append(output)
        surprises.append(surprise)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(surprises, 1), whole.surprise, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.weights, whole.state.weights, rtol=1e-5, atol=1e-6)
    if step == "token":
        assert torch.equal(state.position, whole.state.position)
        torch.testing.assert_close(state.anchor, whole.state.anchor, rtol=1e-5, atol=1e-6)


def test_writing_alone_is_the_write():
    *args, state, options = moved(
        make_inputs(dtype=torch.float32, **CASES["norm, clipped"]), DEVICE
    )
    whole = ops.neural_memory(*args, state, **options, backend="triton")
    alone = ops.memory_update(*args[1:], state, **options, backend="triton")
    for a, b in zip(whole.state.tensors(), alone.state.tensors(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.surprise, alone.surprise)


@pytest.mark.parametrize("inside", [False, True])
def test_one_launch_and_nothing_copied(inside):
    from mal_kernels._triton.neural_memory import memory_fwd

    case = dict(ONE, position=inside, residual_norm=True, max_grad_norm=1.0)
    *tokens, state, o = moved(make_inputs(dtype=torch.float32, **case), DEVICE)
    # of a module's learned memory, which is one for all rows
    init = [w[:1].expand_as(w) for w in state.weights]
    call = MemoryCall.of(tokens, state, init=init, **o)

    def step():
        return memory_fwd(call, keeps=True)

    step()  # compiles
    with counted_launches() as count:
        step()
    assert count == {"decode_fwd_kernel": 1}
