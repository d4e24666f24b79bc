"""Gradients of the CUDA write within the budgets of the reference: emulated, or on a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from emulation import devices
from test_cuda_ops import CASES, memory_inputs

from mal_kernels import ops, reference
from mal_kernels.reference import NeuralMemoryOutput
from mal_kernels.testing import assert_all_within_budget, low_precision, results

device = devices("memory_update.cu", "memory_update_bwd.cu")


def on(device, x):
    """``x``, or every tensor in it, on ``device``."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, (list, tuple)):
        parts = [on(device, y) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def write_on(device, cuts=()):
    """``memory_update`` there, as a function for :func:`results`; one call between two cuts."""

    def write(q, k, *rest, **options):
        *tokens, state = on(device, (k, *rest))
        options = {name: on(device, x) for name, x in options.items()}
        surprises = []
        for begin, end in pairwise([0, *cuts, k.shape[1]]):
            given = (x[:, begin:end] if cuts else x for x in tokens)
            state, surprise = ops.memory_update(*given, state, **options, backend="cuda")
            surprises.append(surprise.cpu())
        if cuts:  # all of them together end with a chunk
            state = state.end_chunk()
        return NeuralMemoryOutput(q.new_empty(0), on("cpu", state), torch.cat(surprises, 1))

    return write


def closed_form(_, *given, **options):
    return reference.neural_memory(None, *given, **options)


def gradient_inputs(dtype=torch.bfloat16, **case):
    """Gates are float32, for float16 would lose their smallest gradients, below 6e-5."""
    inputs = memory_inputs(dtype, **case)
    gates = [None if gate is None else gate.float() for gate in inputs[3:6]]
    return inputs._replace(lr=gates[0], momentum=gates[1], decay=gates[2])


def assert_within_budgets(function, inputs, dtype, definition=closed_form):
    golden = results(definition, inputs.to(torch.float64))
    with low_precision(dtype):
        twin = results(definition, inputs.to(torch.float32))
    assert_all_within_budget(results(function, inputs), golden, twin, dtype)


def of_state(function):
    """``function``, whose gradients are then those of its state alone."""

    def quiet(*given, **options):
        out = function(*given, **options)
        return out._replace(surprise=out.surprise.detach())

    return quiet


NEEDLESS = {"16 blocks", "chunk steps", "linear"}  # take time and show nothing that others do not


@pytest.mark.parametrize("case", [case for case in CASES if case not in NEEDLESS])
def test_gradients_of_the_state(case, device):
    # without those of the surprise, which are first order and much larger, every term shows
    heads = 2 if "ragged" in case or "linear" in case else 1  # of few gates the error is chance
    inputs = gradient_inputs(torch.float16, **CASES[case] | dict(heads=heads))
    assert_within_budgets(of_state(write_on(device)), inputs, torch.float16, of_state(closed_form))


@pytest.mark.parametrize("case", ["norm, clip, odd sizes", "128 features, four blocks"])
def test_gradients(case, device):
    inputs = gradient_inputs(torch.bfloat16, **CASES[case] | dict(heads=1))
    assert_within_budgets(write_on(device), inputs, torch.bfloat16)


def test_a_stream_that_is_cut_has_the_gradients_of_the_whole(device):
    inputs = gradient_inputs(tokens=96, heads=1, hidden=40, chunk_size=32, max_grad_norm=0.5)
    whole, again, cut = (results(write_on(device, c), inputs) for c in ((), (), (32,)))
    for name, x in whole.items():
        assert torch.equal(again[name], x), name
        assert torch.equal(cut[name], x), name  # through memory, in float32
    # inside a chunk, whose tokens then meet in other sums
    assert_within_budgets(write_on(device, (40,)), inputs, torch.bfloat16)
