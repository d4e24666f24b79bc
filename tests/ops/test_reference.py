"""The definition: token loop == closed form, for every choice, split, raggedness and edge value."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_kernels import MemoryState, ops, reference
from mal_kernels.network import ACTIVATIONS
from mal_kernels.testing import Inputs, assert_within_budget, closed_form, make_inputs, results


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], limit: float = 1e-11):
    assert a.keys() == b.keys()
    for name, x in a.items():
        scale = 1 + x.abs().max() if x.numel() else 1
        assert ((x - b[name]).abs() <= limit * scale).all(), name


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual_norm", [False, True])
@pytest.mark.parametrize("step", ["token", "chunk"])
def test_closed_form_is_the_token_loop(depth, activation, residual_norm, step):
    for init, clip, chunk_size in itertools.product((False, True), (None, 0.5), (4, None)):
        inputs = make_inputs(
            tokens=9,
            head_dim=4,
            hidden=5,
            depth=depth,
            activation=activation,
            residual_norm=residual_norm,
            step=step,
            init=init,
            max_grad_norm=clip,
            chunk_size=chunk_size,
        )
        loop = results(reference.recurrence, inputs)
        assert_same(loop, results(closed_form, inputs))
        assert_same(loop, results(ops.neural_memory, inputs))  # gradients derived by hand


@pytest.mark.parametrize("step", ["token", "chunk"])
@pytest.mark.parametrize("gates", [False, True])
def test_absent_and_edge_gates(step, gates):
    inputs = make_inputs(step=step, gates=gates, edges=gates, init=True)
    loop = results(reference.recurrence, inputs)
    assert_same(loop, results(closed_form, inputs))
    assert_same(loop, results(ops.neural_memory, inputs))


@pytest.mark.parametrize("step", ["token", "chunk"])
@pytest.mark.parametrize("chunk_size", [5, None])
def test_ragged_is_each_alone(step, chunk_size):
    lengths = [3, 0, 11, 1, 5]
    inputs = make_inputs(lengths=lengths, step=step, chunk_size=chunk_size, residual_norm=True)
    *args, options = inputs
    whole = closed_form(*args, **options)
    cu_seqlens = options.pop("cu_seqlens")
    gate = 0
    for row, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        n = 1 if chunk_size is None else max(1, -(-(end - begin) // chunk_size))
        tokens = [x[:, begin:end] for x in args[:4]]
        gates = [x[:, gate : gate + n] if step == "chunk" else x[:, begin:end] for x in args[4:6]]
        gate += n
        alone = closed_form(
            *tokens, *gates, inputs.state.index_select(torch.tensor([row])), **options
        )
        torch.testing.assert_close(alone.output, whole.output[:, begin:end])
        for a, b in zip(alone.state.weights, whole.state.weights, strict=True):
            torch.testing.assert_close(a[0], b[row])
        for a, b in zip(alone.state.momentum, whole.state.momentum, strict=True):
            torch.testing.assert_close(a[0], b[row])


def test_ragged_from_inside_a_chunk_is_the_token_loop():
    inputs = make_inputs(lengths=[3, 0, 11, 1, 5], position=True, chunk_size=5, init=True)
    loop = results(reference.recurrence, inputs)
    assert_same(loop, results(closed_form, inputs))
    assert_same(loop, results(ops.neural_memory, inputs))
    *args, options = inputs
    loop, closed = (f(*args, **options).state.position for f in (reference.recurrence, closed_form))
    assert torch.equal(loop, closed)


def split(inputs: Inputs, marks: list[int]) -> tuple[torch.Tensor, torch.Tensor, MemoryState]:
    *args, state, options = inputs
    outputs, surprises = [], []
    for begin, end in itertools.pairwise([0, *marks, inputs.k.shape[1]]):
        part = [x[:, begin:end] for x in args]
        output, state, surprise = closed_form(*part, state, **options)
        outputs.append(output)
        surprises.append(surprise)
    return torch.cat(outputs, 1), torch.cat(surprises, 1), state


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_of_a_stream_is_the_whole(data):
    tokens = data.draw(st.integers(0, 20), "tokens")
    inputs = make_inputs(
        tokens=tokens,
        head_dim=3,
        hidden=4,
        chunk_size=data.draw(st.integers(1, 7), "chunk_size"),
        residual_norm=data.draw(st.booleans(), "residual_norm"),
        init=data.draw(st.booleans(), "init"),
        edges=data.draw(st.booleans(), "edges"),
        max_grad_norm=data.draw(st.sampled_from([None, 0.3]), "max_grad_norm"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    marks = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=6), "marks"))
    output, surprise, state = split(inputs, marks)
    *args, options = inputs
    whole = closed_form(*args, **options)
    torch.testing.assert_close(output, whole.output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(surprise, whole.surprise, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state[:2], whole.state[:2], rtol=1e-10, atol=1e-12)
    if state.position is not None and whole.state.position is not None:
        assert torch.equal(state.position, whole.state.position)


def test_decoding_token_by_token_is_prefill():
    inputs = make_inputs(tokens=17, chunk_size=4, residual_norm=True)
    *args, options = inputs
    whole = closed_form(*args, **options)
    output, _, state = split(inputs, list(range(1, 17)))
    torch.testing.assert_close(output, whole.output)
    torch.testing.assert_close(state.weights, whole.state.weights)


@pytest.mark.parametrize("step", ["token", "chunk"])
def test_nothing_to_do_is_done(step):
    for empty in (dict(tokens=0), dict(batch=0), dict(lengths=[0, 0])):
        *args, options = make_inputs(step=step, residual_norm=True, **empty)
        out = closed_form(*args, **options)
        assert out.output.shape == args[0].shape
        assert all(torch.equal(a, b) for a, b in zip(out.state[0], args[6][0], strict=True))


def test_end_chunk_moves_the_anchor():
    inputs = make_inputs(tokens=6, chunk_size=8)
    *args, options = inputs
    open_ = closed_form(*args, **options).state
    more = [*args[:6], open_]
    closed = [*args[:6], open_.end_chunk()]
    a = closed_form(*more, **options).output
    b = closed_form(*closed, **options).output
    assert (a - b).abs().max() > 1e-6
    loop = reference.recurrence(*closed, **options).output
    torch.testing.assert_close(b, loop)


@pytest.mark.parametrize("step", ["token", "chunk"])
def test_no_token_changes_an_earlier_output(step):
    inputs = make_inputs(tokens=12, chunk_size=4, step=step)
    *args, options = inputs
    base = closed_form(*args, **options).output
    for t in range(12):
        moved = [x.clone() for x in args[:3]]
        for x in moved:
            x[:, t] += 1.0
        out = closed_form(*moved, *args[3:], **options).output
        assert torch.equal(out[:, :t], base[:, :t])
        assert not torch.equal(out[:, t], base[:, t])


def test_gates_at_their_ends_do_what_they_say():
    inputs = make_inputs(tokens=7, chunk_size=4)
    q, k, v, lr, momentum, decay, state, options = inputs
    still = closed_form(q, k, v, 0 * lr, 0 * momentum, 0 * decay, state, **options)
    assert all(torch.equal(a, b) for a, b in zip(still.state.weights, state.weights, strict=True))
    erased = closed_form(q, k, v, 0 * lr, 0 * momentum, 1 + 0 * decay, state, **options)
    assert all((w == 0).all() for w in erased.state.weights)
    plain = closed_form(q, k, v, lr, 0 * momentum, decay, state, **options)
    absent = closed_form(q, k, v, lr, None, decay, state, **options)
    assert torch.equal(plain.output, absent.output)


def test_decay_pulls_toward_init():
    inputs = make_inputs(tokens=7, chunk_size=4, init=True)
    q, k, v, lr, momentum, decay, state, options = inputs
    out = closed_form(q, k, v, 0 * lr, 0 * momentum, 1 + 0 * decay, state, **options)
    assert all(torch.equal(a, b) for a, b in zip(out.state.weights, options["init"], strict=True))


@pytest.mark.parametrize("edges", [False, True])
def test_gradcheck(edges):
    inputs = make_inputs(
        batch=1, tokens=5, heads=1, head_dim=2, hidden=3, chunk_size=3, residual_norm=True,
        max_grad_norm=0.5, init=True, edges=edges,
    )  # fmt: skip
    tensors = [t.requires_grad_() for t in inputs.tensors()]
    n = len(inputs.state.weights)

    def function(*tensors):
        state = MemoryState(tensors[6 : 6 + n], tensors[6 + n : 6 + 2 * n])
        options = inputs.options | {"init": tensors[6 + 2 * n :]}
        out = closed_form(*tensors[:6], state, **options)
        return out.output, out.surprise, *out.state.weights, *out.state.momentum

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_a_hundred_thousand_tokens_do_not_drift():
    # 1,563 chunks in float32 stay within Tier 0 of float64; decay toward zero would end in zeros
    sizes = dict(tokens=100_000, chunk_size=64, head_dim=4, hidden=4, init=True)
    inputs = make_inputs(batch=1, heads=1, **sizes)
    *args, options = inputs.to(torch.float32)
    *golden_args, golden_options = inputs.to(torch.float32).to(torch.float64)
    with torch.no_grad():
        out = closed_form(*args, **options)
        golden = closed_form(*golden_args, **golden_options)
    assert golden.output[:, -64:].abs().max() > 0.1
    assert_within_budget("output", out.output, golden.output)
    for a, b in zip(out.state.weights, golden.state.weights, strict=True):
        assert_within_budget("weights", a, b)


def with_gradients(function, tensors):
    """Outputs of ``function`` and gradients of a fixed random loss over them."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    out = [out] if isinstance(out, torch.Tensor) else [*out]
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=g)).sum() for x in out)
    grads = torch.autograd.grad(loss, tensors, materialize_grads=True, allow_unused=True)
    named = {f"output {i}": x.detach() for i, x in enumerate(out)}
    return named | {f"grad {i}": x for i, x in enumerate(grads)}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("given", ["all", "no state", "no momentum", "no decay"])
def test_momentum_scan_is_its_loop(shape, ragged, given):
    lengths = [4, 0, 1, 6] if ragged else None
    batch, tokens, rows = (1, 11, 4) if ragged else (2, 11, 2)
    g = torch.Generator().manual_seed(0)
    u = torch.randn(batch, tokens, 2, *shape, dtype=torch.float64, generator=g)
    eta, alpha = torch.rand(2, batch, tokens, 2, dtype=torch.float64, generator=g)
    eta[:, 2], alpha[:, 5] = 0.0, 1.0
    w0, s0 = torch.randn(2, rows, 2, *shape, dtype=torch.float64, generator=g)
    cu = torch.tensor([0, *lengths]).cumsum(0) if ragged else None

    def call(scan):
        def function(u, eta, alpha, w0, s0):
            state = None if given == "no state" else MemoryState((w0,), (s0,))
            eta = None if given == "no momentum" else eta
            alpha = None if given == "no decay" else alpha
            return scan(u, eta, alpha, state, cu_seqlens=cu)

        return function

    found = (
        with_gradients(call(scan), (u, eta, alpha, w0, s0))
        for scan in (reference.momentum_scan, ops.momentum_scan)
    )
    assert_same(*found)


def test_scan_of_gradients_is_the_memory():
    # the bare recurrence, fed with the gradients of a linear memory, gives the same weights
    inputs = make_inputs(depth=1, tokens=6, chunk_size=None)
    q, k, v, lr, momentum, decay, state, options = inputs
    w = state.weights[0]
    error = k.transpose(1, 2) @ w - v.transpose(1, 2)  # [B, H, T, D]
    gradient = torch.einsum("bthi,bhtj->bthij", k, 2 * error)
    scanned = ops.momentum_scan(-lr[..., None, None] * gradient, momentum, decay, state)
    out = closed_form(q, k, v, lr, momentum, decay, state, **options)
    torch.testing.assert_close(scanned.weights[:, -1], out.state.weights[0])
    torch.testing.assert_close(scanned.momentum[:, -1], out.state.momentum[0])
    read = torch.einsum("bthi,bthij->bthj", q, scanned.weights)
    torch.testing.assert_close(read, out.output)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual_norm", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_reads_are_their_loops(activation, residual_norm, depth):
    inputs = make_inputs(lengths=[4, 0, 7], residual_norm=residual_norm, depth=depth)
    weights, (heads, dim) = inputs.state.weights, inputs.k.shape[2:]
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 10), (10,), (heads * dim, 10), (heads * dim, 10), (10, heads * dim)]
    hidden, *params = (torch.randn(s, dtype=torch.float64, generator=g) for s in shapes)
    index = (torch.tensor([7, 1, 2, 11]), torch.tensor([2, 0, 2, 1]))
    options = dict(activation=activation, residual_norm=residual_norm)

    def aligned(library):
        def function(hidden, *tensors):
            state, params = MemoryState(tensors[4:], tensors[4:]), ops.ReadParams(*tensors[:4])
            return library.aligned_residual_read(hidden, *index, state, params, **options)

        return function

    def read(library, cu_seqlens):
        def function(q, *weights):
            state = MemoryState(weights, weights)
            return library.memory_read(q, state, cu_seqlens=cu_seqlens, **options)

        return function

    libraries = (reference, ops)
    assert_same(*(with_gradients(aligned(x), (hidden, *params, *weights)) for x in libraries))
    ragged = inputs.options["cu_seqlens"]
    assert_same(*(with_gradients(read(x, ragged), (inputs.q, *weights)) for x in libraries))
    q = inputs.q.view(-1, 1, heads, dim)[:3]
    assert_same(*(with_gradients(read(x, None), (q, *weights)) for x in libraries))
