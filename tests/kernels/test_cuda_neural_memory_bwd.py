"""Gradients of the CUDA memory within the budgets of the reference: emulated, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from mal_kernels.testing import assert_all_within_budget, closed_form, low_precision, results
from mal_kernels.testing.emulation import devices
from tests.support.cuda import CASES, gradient_inputs, layer_on, write_on

device = devices("neural_memory_fwd.cu", "causal_read_bwd.cu", "write_bwd.cu")


def closed_write(_, *given, **options):
    return closed_form(None, *given, **options)


def assert_within_budgets(function, inputs, dtype, definition=closed_write):
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


def of_output(function):
    """``function``, whose gradients are then those of what it reads alone."""

    def quiet(*given, **options):
        out = of_state(function)(*given, **options)
        return out._replace(state=out.state.map(torch.Tensor.detach))

    return quiet


NEEDLESS = {"16 blocks", "chunk steps", "linear"}  # take time and show nothing that others do not
READS = [case for case in CASES if case not in ("16 blocks", "no tokens")]


@pytest.mark.parametrize("case", [case for case in CASES if case not in NEEDLESS])
def test_gradients_of_the_state(case, device):
    # without those of the surprise, which are first order and much larger, every term shows
    heads = 2 if "ragged" in case or "linear" in case else 1  # of few gates the error is chance
    inputs = gradient_inputs(torch.float16, **CASES[case] | dict(heads=heads))
    assert_within_budgets(of_state(write_on(device)), inputs, torch.float16, of_state(closed_write))


@pytest.mark.parametrize("case", READS)
def test_gradients_of_what_is_read(case, device):
    # without the others, which would cover them
    sizes = dict(heads=2 if CASES[case].get("tokens", 40) < 50 else 1)  # gates as above
    inputs = gradient_inputs(torch.float16, **CASES[case] | sizes)
    layer, definition = of_output(layer_on(device)), of_output(closed_form)
    assert_within_budgets(layer, inputs, torch.float16, definition)


@pytest.mark.parametrize("case", ["norm, clip, odd sizes", "128 features, four blocks"])
def test_gradients(case, device):
    inputs = gradient_inputs(torch.bfloat16, **CASES[case] | dict(heads=1))
    assert_within_budgets(write_on(device), inputs, torch.bfloat16)


@pytest.mark.parametrize("case", ["inside a chunk, norm, init", "linear, norm, clip", "no tokens"])
def test_gradients_of_all_that_the_layer_gives(case, device):
    inputs = gradient_inputs(torch.bfloat16, **CASES[case])
    assert_within_budgets(layer_on(device), inputs, torch.bfloat16, closed_form)


@pytest.mark.parametrize("reads", [False, True])
def test_a_stream_that_is_cut_has_the_gradients_of_the_whole(reads, device):
    inputs = gradient_inputs(tokens=96, heads=1, hidden=40, chunk_size=32, max_grad_norm=0.5)
    whole, again, cut = (results(layer_on(device, c, reads), inputs) for c in ((), (), (32,)))
    for name, x in whole.items():
        assert torch.equal(again[name], x), name
        assert torch.equal(cut[name], x), name  # through memory, in float32
    # inside a chunk, whose tokens then meet in other sums
    definition = closed_form if reads else closed_write
    assert_within_budgets(layer_on(device, (40,), reads), inputs, torch.bfloat16, definition)


@pytest.mark.parametrize("step", ["token", "chunk"])
def test_what_comes_later_has_no_gradient(step, device):
    # of the seventh token of a chunk's second tile
    inputs = gradient_inputs(tokens=140, chunk_size=130, heads=1, step=step, max_grad_norm=1.0)

    def early(*given, **options):
        out = of_output(layer_on(device))(*given, **options)
        return out._replace(output=out.output[:, 64:71])

    names = ["q", "k", "v", "lr"]
    grads = [x for name, x in results(early, inputs).items() if name.startswith("grad")]
    for name, x in zip(names, grads[:4], strict=True):
        assert (x[:, 71:] == 0).all(), name
        is_read = step == "token" or name == "q"  # with chunk steps the state before the chunk is
        assert (x[:, 64:71] != 0).any() == is_read, name
