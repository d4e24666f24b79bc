"""Planted-wrong variants must fail the assertions that the kernels pass."""

from __future__ import annotations

import itertools

import pytest
import torch

from mal_kernels import ops
from mal_kernels.testing import assert_parity, low_precision, make_inputs


def late_decay(q, k, v, lr, momentum, decay, state, **options):
    """decay of the previous token"""
    shifted = torch.cat([decay[:, :1], decay[:, :-1]], 1)
    return ops.neural_memory(q, k, v, lr, momentum, shifted, state, **options)


def dropped_token(q, k, v, lr, momentum, decay, state, **options):
    """the last token is read but not written"""
    mask = torch.ones_like(lr)
    mask[:, -1] = 0
    return ops.neural_memory(q, k, v, lr * mask, momentum, decay, state, **options)


def by_chunk(change):
    """Runs chunk by chunk and applies ``change`` to the state in between."""

    def function(*args, **options):
        *args, state = args
        outputs, surprises = [], []
        marks = [*range(0, args[1].shape[1], options["chunk_size"]), args[1].shape[1]]
        for begin, end in itertools.pairwise(marks):
            part = [x[:, begin:end] for x in args]
            output, state, surprise = ops.neural_memory(*part, change(state), **options)
            outputs.append(output)
            surprises.append(surprise)
        join = [torch.cat(x, 1) for x in (outputs, surprises)]
        return ops.NeuralMemoryOutput(join[0], state, join[1])

    return function


def unchanged(state):
    return state


def momentum_reset(state):
    """momentum forgotten at every chunk boundary"""
    return state._replace(momentum=tuple(0 * m for m in state.momentum))


def bf16_state(state):
    """state carried in bfloat16"""
    return state.map(lambda t: t.bfloat16().to(t.dtype))


def inputs(dtype):
    return make_inputs(
        tokens=64, chunk_size=16, head_dim=16, hidden=32, dtype=dtype, max_lr=0.2, seed=3
    )


WRONG = [late_decay, dropped_token, by_chunk(momentum_reset), by_chunk(bf16_state)]
NAMES = ["late_decay", "dropped_token", "momentum_reset", "bf16_state"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [ops.neural_memory, by_chunk(unchanged)])
def test_the_right_ones_pass(function, dtype):
    assert_parity(function, inputs(dtype))


@pytest.mark.parametrize("function", WRONG, ids=NAMES)
def test_tier_0_sees_every_planted_bug(function):
    with pytest.raises(AssertionError, match="of budget"):
        assert_parity(function, inputs(torch.float32))


@pytest.mark.parametrize("function", WRONG[:3], ids=NAMES[:3])
def test_tier_1_sees_the_bugs_larger_than_its_rounding(function):
    with pytest.raises(AssertionError, match="of budget"):
        assert_parity(function, inputs(torch.bfloat16))


def test_one_wrong_element_is_seen():
    def function(*args, **options):
        out = ops.neural_memory(*args, **options)
        poke = torch.zeros_like(out.output)
        poke[0, 5, 0, 3] = 0.5 * out.output.detach().abs().max()
        return out._replace(output=out.output + poke)

    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(AssertionError, match="output"):
            assert_parity(function, inputs(dtype))


def test_nan_is_seen():
    def function(*args, **options):
        out = ops.neural_memory(*args, **options)
        return out._replace(output=out.output * float("nan"))

    with pytest.raises(AssertionError, match="output"):
        assert_parity(function, inputs(torch.float32))


def test_low_precision_rounds_every_kind_of_product():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 5, 4)
    zeros = torch.zeros(2, 3, 4)
    rounded = torch.bmm(*(x.bfloat16().float() for x in (a, b)))
    with low_precision(torch.bfloat16):
        assert torch.equal(a @ b, rounded)
        assert torch.equal(torch.baddbmm(zeros, a, b), rounded)
        assert torch.equal(a[0] @ b[0], rounded[0])
        assert torch.equal(torch.addmm(zeros[0], a[0], b[0]), rounded[0])
