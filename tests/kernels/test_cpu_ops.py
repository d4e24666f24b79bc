"""The native CPU kernels within the budgets of the definition, for every option of the contract."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from mal_kernels import BackendUnavailable, MemoryState, ops, reference
from mal_kernels._cpu import library
from mal_kernels.call import MemoryCall
from mal_kernels.testing import (
    assert_all_within_budget,
    assert_parity,
    make_inputs,
    results,
)
from mal_kernels.testing.oracles import TitansPytorch
from tests.support.native import compiled, needs_library, serve

needs_library()

neural_memory = functools.partial(ops.neural_memory, backend="cpu")
memory_update = functools.partial(ops.memory_update, backend="cpu")

CASES = {
    "token steps": dict(),
    "chunk steps": dict(step="chunk"),
    "linear": dict(depth=1),
    "norm": dict(residual_norm=True),
    "linear, norm, chunk steps": dict(depth=1, residual_norm=True, step="chunk"),
    "norm, init, clip": dict(residual_norm=True, init=True, max_grad_norm=0.5),
    "chunk steps, norm, init, clip": dict(
        step="chunk", residual_norm=True, init=True, max_grad_norm=0.5
    ),
    "linear, init, clip": dict(depth=1, init=True, max_grad_norm=0.5),
    "one chunk": dict(chunk_size=None),
    "turns": dict(step="chunk", chunk_size=None, lengths=[9, 0, 28, 1], init=True),
    "ragged chunk steps": dict(step="chunk", lengths=[9, 0, 17]),
    "ragged": dict(lengths=[5, 0, 17, 1]),
    "ragged, inside a chunk": dict(lengths=[5, 0, 17, 1], position=True),
    "inside a chunk, gates of 0 and 1": dict(position=True, edges=True),
    "no gates": dict(gates=False),
    "chunks of one token": dict(tokens=7, chunk_size=1),
    "three tiles in a chunk": dict(tokens=150, batch=1, chunk_size=140, init=True, clip=0.5),
    "three tiles in a chunk, chunk steps": dict(tokens=150, batch=1, chunk_size=140, step="chunk"),
    "one feature": dict(head_dim=1, hidden=1),
    "whole vectors": dict(head_dim=16, hidden=32, residual_norm=True),
    "odd sizes": dict(head_dim=19, hidden=37, residual_norm=True, position=True),
    "one token": dict(tokens=1),
    "no tokens": dict(tokens=0),
    "no tokens, inside a chunk": dict(tokens=0, position=True),
    **{
        name: dict(activation=name, max_grad_norm=0.5)
        for name in ("gelu", "gelu_tanh", "silu", "relu")
    },
}


def inputs_of(case, **more):
    sizes = dict(CASES[case]) | more
    clip = sizes.pop("clip", None)
    return make_inputs(**sizes | (dict(max_grad_norm=clip) if clip else {}))


@pytest.mark.parametrize("case", CASES)
def test_parity_in_float32(case):
    assert_parity(neural_memory, inputs_of(case, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["token steps", "odd sizes", "turns", "relu"])
def test_parity_in_low_precision(case, dtype):
    assert_parity(neural_memory, inputs_of(case, dtype=dtype))


def write_of(function):
    """What of the layer the write returns, for its gradients."""

    def write(q, *args, **options):
        return function(q, *args, **options)._replace(output=q.new_empty(0))

    return write


def written(q, *args, **options):
    return ops.NeuralMemoryOutput(q.new_empty(0), *memory_update(*args, **options))


@pytest.mark.parametrize("case", CASES)
def test_the_write_alone_is_that_of_the_layer(case):
    inputs = inputs_of(case, dtype=torch.float32)
    alone, whole = results(written, inputs), results(write_of(neural_memory), inputs)
    golden = results(write_of(reference.recurrence), inputs.to(torch.float64))
    assert_all_within_budget(alone, golden, None, torch.float32)
    for name, x in alone.items():
        assert name.startswith("grad") or torch.equal(x, whole[name]), name


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_any_size(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    tokens = draw(0, 90)
    chunk = data.draw(st.sampled_from([None, 1, 5, 64, 70]))
    step = data.draw(st.sampled_from(["token", "chunk"]))
    norm = data.draw(st.booleans())
    inputs = make_inputs(
        batch=1,
        heads=draw(1, 2),
        tokens=tokens,
        head_dim=draw(4 if norm else 1, 35),  # the norm of a feature or two is nearly a sign
        hidden=draw(1, 35),
        depth=draw(1, 2),
        chunk_size=chunk,
        step=step,
        residual_norm=norm,
        init=data.draw(st.booleans()),
        lengths=data.draw(st.sampled_from([None, [tokens], [0, tokens, 3]])),
        position=data.draw(st.booleans()) and step == "token" and chunk is not None,
        seed=draw(0, 99),
    )
    golden = results(functools.partial(ops.neural_memory, backend="reference"), inputs)
    actual = results(neural_memory, inputs.to(torch.float32))
    assert_all_within_budget(actual, golden, None, torch.float32)


@pytest.mark.parametrize("marks", [(64, 128), (1, 40, 101)])
@pytest.mark.parametrize("step", ["token", "chunk"])
def test_a_stream_cut_anywhere_is_the_whole(marks, step):
    if step == "chunk":
        marks = tuple(m // 10 * 10 for m in marks if m >= 10)
    chunk = 100 if step == "token" else 10
    *tokens, state, options = make_inputs(
        tokens=130, batch=1, chunk_size=chunk, step=step, dtype=torch.float32, init=True
    )
    whole = neural_memory(*tokens, state, **options)
    outputs = []
    for a, b in pairwise((0, *marks, 130)):
        gates = slice(a, b) if step == "token" else slice(a // chunk, b // chunk)
        part = [x[:, a:b] for x in tokens[:4]] + [x[:, gates] for x in tokens[4:]]
        output, state, _ = neural_memory(*part, state, **options)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output, rtol=2e-5, atol=2e-6)
    for a, b in zip(state.weights, whole.state.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_one_and_two_threads_give_the_same_bits():
    inputs = make_inputs(heads=3, tokens=70, residual_norm=True, init=True, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(results(neural_memory, inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], x) for name, x in other.items())


def test_denormals_are_flushed_inside_and_stay_outside():
    *args, state, options = make_inputs(dtype=torch.float32)
    tiny = state.map(lambda w: torch.full_like(w, 1e-39))  # denormal
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = neural_memory(*args, tiny, **options)
        finally:
            torch.set_num_threads(before)
        assert all((w == 0).all() for w in out.state.weights)
        assert (torch.full((1000,), 1e-30) * 1e-9 > 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("norm", [False, True])
def test_what_is_not_finite_stays_so_where_the_definition_says(bad, which, norm):
    inputs = make_inputs(head_dim=9, hidden=13, residual_norm=norm, dtype=torch.float32)
    clean = results(neural_memory, inputs)
    *args, options = inputs
    args[which] = args[which].clone()
    args[which][0, 11, 1, 2] = bad
    actual, expected = (
        ops.neural_memory(*args, **options, backend=b) for b in ("cpu", "reference")
    )
    for a, b in zip(
        (actual.output, actual.surprise, *actual.state.weights, *actual.state.momentum),
        (expected.output, expected.surprise, *expected.state.weights, *expected.state.momentum),
        strict=True,
    ):
        assert torch.equal(a.isfinite(), b.isfinite())
    # and no scratch remembers it
    assert all(torch.equal(clean[n], x) for n, x in results(neural_memory, inputs).items())


def test_low_precision_rounds_as_torch_does():
    # the memory is the identity and writes nothing, so that y is q, rounded once
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        q = bits.view(dtype)
        q = q[q.isfinite() & (q.abs() >= 1e-37) | (q == 0)].view(1, -1, 1, 1)  # none is flushed
        zero = torch.zeros(q.shape[:3])
        state = MemoryState.from_weights((torch.ones(1, 1, 1, 1),))
        out = neural_memory(q, 0 * q, 0 * q, zero, None, None, state, chunk_size=64)
        assert torch.equal(out.output, q)
        scaled = MemoryState.from_weights((torch.full((1, 1, 1, 1), 0.7251),))
        out = neural_memory(q, 0 * q, 0 * q, zero, None, None, scaled, chunk_size=64)
        assert torch.equal(out.output, (q.float() * 0.7251).to(dtype))


# --- every build ----------------------------------------------------------------------------------

FEW = ["token steps", "chunk steps, norm, init, clip", "odd sizes", "gelu_tanh", "silu", "relu"]


@pytest.mark.parametrize(
    "target", ["avx2", "avx512", pytest.param("portable", marks=pytest.mark.slow)]
)
def test_every_instruction_set(target, monkeypatch):
    capability = {"portable": 0, "avx2": 1, "avx512": 2}
    if capability[target] > capability[library.target()]:
        pytest.skip(f"this processor has no {target}")
    monkeypatch.setattr(library, "target", lambda: target)
    lanes = {"avx512": 16, "avx2": 8, "portable": 4}
    assert library.load(target).mal_cpu_lanes() == lanes[target]
    for case in FEW:
        assert_parity(neural_memory, inputs_of(case, dtype=torch.float32))


@pytest.mark.parametrize("lanes", [4, 16])
def test_every_width_of_a_vector(lanes, monkeypatch, tmp_path):
    serve(monkeypatch, compiled(tmp_path, f"-DMAL_LANES={lanes}"))
    for case in FEW:
        assert_parity(neural_memory, inputs_of(case, dtype=torch.float32))


# --- the operator -----------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "grad"), [("token steps", False), ("turns", True)])
def test_opcheck(case, grad):
    *given, state, options = inputs_of(case, dtype=torch.float32).map(
        lambda t: t.clone().requires_grad_(grad)
    )
    for tokens in (given, [None, *given[1:]]):
        call = MemoryCall.of(tokens, state, **options)
        opcheck(torch.ops.mal_kernels.neural_memory.default, (*call, "cpu"))


def test_compiles_whole_with_dynamic_shapes():
    def layer(q, k, v, lr, momentum, decay, weights):
        state = MemoryState.from_weights(weights)
        out = neural_memory(q, k, v, lr, momentum, decay, state, chunk_size=4)
        again = ops.memory_update(k, v, lr, momentum, decay, out.state, chunk_size=4)
        return out.output, again.surprise, again.state.weights

    compiled_layer = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (8, 9):
        *args, state, _ = make_inputs(tokens=tokens, dtype=torch.float32).map(
            lambda t: t.clone().requires_grad_()
        )
        found = []
        for f in (layer, compiled_layer):
            output, surprise, weights = f(*args, state.weights)
            loss = output.sum() + surprise.sum() + sum(w.sum() for w in weights)
            found.append((output, *torch.autograd.grad(loss, [*args, *state.weights])))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("residual_norm", [False, True])
@pytest.mark.parametrize("step", ["token", "chunk"])
def test_equals_titans_pytorch(residual_norm, step):
    options = dict(heads=3, head_dim=8, chunk_size=16, step=step, residual_norm=residual_norm)
    inputs = make_inputs(tokens=48, hidden=16, max_lr=0.01, **options)
    output, state = TitansPytorch(hidden_dim=16, **options)(*inputs[:7])
    ours = neural_memory(*inputs.to(torch.float32)[:7], **inputs.options)
    # there, a chunk's last token reads what its own chunk has written
    shared = torch.arange(1, 49) % 16 != (0 if step == "chunk" else 16)
    pairs = [(ours.output[:, shared], output[:, shared])]
    pairs += zip(ours.state.weights, state.weights, strict=True)
    pairs += zip(ours.state.momentum, state.momentum, strict=True)
    for a, b in pairs:
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


# --- which calls it serves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (dict(), "float64 is served by the reference alone"),
        (dict(depth=3, dtype=torch.float32), "depth 1 and 2, not 3"),
    ],
)
def test_what_it_does_not_serve_is_refused_in_words_and_auto_goes_on(case, message):
    *args, options = make_inputs(**case)
    with pytest.raises(BackendUnavailable, match=message):
        neural_memory(*args, **options)
    auto, portable = (ops.neural_memory(*args, **options, backend=b) for b in ("auto", "reference"))
    assert torch.equal(auto.output, portable.output)


def test_auto_takes_it(monkeypatch):
    monkeypatch.delenv("MAL_BACKEND", raising=False)
    assert ops.explain("neural_memory") == ("cpu", "the native kernels serve it")
    *args, options = make_inputs(dtype=torch.float32)
    auto, native = (ops.neural_memory(*args, **options, backend=b) for b in ("auto", "cpu"))
    assert torch.equal(auto.output, native.output)
    monkeypatch.setenv("MAL_BACKEND", "reference")
    assert ops.explain("neural_memory")[0] == "reference"
