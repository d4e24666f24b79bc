"""The native CPU kernels of reads and of the scan within the budgets of the definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.library import opcheck

from mal_kernels import ArgumentError, BackendUnavailable, MemoryState, ops, reference
from mal_kernels.testing import assert_all_within_budget, low_precision, make_inputs
from tests.support.native import needs_library

needs_library()

READS = {
    "plain": dict(tokens=23, head_dim=8, hidden=12),
    "two tiles": dict(tokens=70, batch=1, head_dim=16, hidden=32),
    "silu, odd sizes": dict(tokens=19, head_dim=19, hidden=37, activation="silu"),
    "gelu_tanh, norm": dict(activation="gelu_tanh", residual_norm=True, hidden=40),
    "relu, ragged": dict(activation="relu", lengths=[5, 0, 17, 1, 33]),
    "linear, norm, ragged": dict(depth=1, head_dim=20, lengths=[7, 30], residual_norm=True),
    "no tokens": dict(tokens=0),
}
SCANS = {
    "plain": dict(tokens=70),
    "no state": dict(state=False),
    "no gates": dict(gates=0),
    "momentum alone": dict(gates=1, state=False),
    "two blocks, edges": dict(features=(5, 60), edges=True),
    "ragged": dict(lengths=[5, 0, 40, 1]),
    "no tokens": dict(tokens=0),
}


def found(function, tensors):
    """Outputs of a function and the gradients of a fixed random loss over them."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    g = torch.Generator().manual_seed(1)
    noise = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in out]
    loss = sum((x * n).sum() for x, n in zip(out, noise, strict=True))
    grads = torch.autograd.grad(loss, tensors, materialize_grads=True, allow_unused=True)
    names = [*(f"output {i}" for i in range(len(out))), *(f"grad {i}" for i in range(len(grads)))]
    return dict(zip(names, [x.detach() for x in (*out, *grads)], strict=True))


def assert_same(op, golden, tensors, dtype):
    expected, twin = found(golden, [t.double() for t in tensors]), None
    if dtype != torch.float32:
        with low_precision(dtype):
            twin = found(golden, [t.float() for t in tensors])
    assert_all_within_budget(found(op, tensors), expected, twin, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", READS)
def test_memory_read(case, dtype):
    inputs = make_inputs(**READS[case])
    keys = ("activation", "residual_norm", "cu_seqlens")
    options = {n: inputs.options.get(n) for n in keys}

    def of(function, **more):
        return lambda q, *w: function(q, MemoryState(w, w), **options, **more)

    tensors = [inputs.q.to(dtype), *(w.float() for w in inputs.state.weights)]
    assert_same(of(ops.memory_read, backend="cpu"), of(reference.memory_read), tensors, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SCANS)
def test_momentum_scan(case, dtype):
    def of(
        tokens=37, features=(7,), lengths=None, state=True, gates=2, edges=False
    ):  # tensors, and a call of them
        rows, batch, cu_seqlens = 2, 2, None
        if lengths:
            rows, batch, tokens = len(lengths), 1, sum(lengths)
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        g = torch.Generator().manual_seed(2)
        update = torch.randn(batch, tokens, 2, *features, generator=g)
        every = torch.randn(2, batch, tokens, 2, generator=g).sigmoid()
        if edges:
            every[every < 0.2], every[every > 0.8] = 0.0, 1.0
        initial = torch.randn(2, rows, 2, *features, generator=g)

        def call(function, **more):
            def run(update, *rest):
                eta, alpha = [*rest[:gates], None, None][:2]
                start = MemoryState((rest[-2],), (rest[-1],)) if state else None
                return function(update, eta, alpha, start, cu_seqlens=cu_seqlens, **more)

            return run

        return [update.to(dtype), *every[:gates], *(initial if state else ())], call

    tensors, call = of(**SCANS[case])
    native, golden = call(ops.momentum_scan, backend="cpu"), call(reference.momentum_scan)
    assert_same(native, golden, tensors, dtype)


def turn(heads=2, D=8, E=12, Dm=20, depth=2, norm=False, rows=3, seed=0):
    """A turn of some tokens of ``hidden`` ``[2, 9, Dm]``: all arguments of the aligned read."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    dims = [D, *[E] * (depth - 1), D]
    weights = [normal(rows, heads, a, b) / a**0.5 for a, b in pairwise(dims)]
    weights += [0.3 * normal(rows, heads, D)] if norm else []
    inner = heads * D
    params = [1 + 0.1 * normal(Dm), *normal(2, inner, Dm) / Dm**0.5, normal(Dm, inner) / inner**0.5]
    token = torch.randperm(18, generator=g)[:11]
    state = torch.randint(0, rows, (11,), generator=g)
    return normal(2, 9, Dm), token, state, weights, params


def aligned(function, index, norm, **more):
    def run(hidden, *rest):
        state = MemoryState.from_weights(rest[:-4])
        params = ops.ReadParams(*rest[-4:])
        return function(hidden, *index, state, params, residual_norm=norm, **more)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(depth=1, norm=True, D=5),
        dict(Dm=300, D=64, E=128, heads=4),
        dict(rows=1, D=19, E=37, norm=True, Dm=33),
    ],
)
def test_aligned_residual_read(case, dtype):
    hidden, *index, weights, params = turn(**case)
    norm = case.get("norm", False)
    tensors = [hidden.to(dtype), *(x.float() for x in (*weights, *params))]
    native = aligned(ops.aligned_residual_read, index, norm, backend="cpu")
    golden = aligned(reference.aligned_residual_read, index, norm)
    assert_same(native, golden, tensors, dtype)
    with torch.no_grad():
        out = native(*tensors)
        others = torch.ones(18, dtype=torch.bool).index_fill(0, index[0], False)
        assert torch.equal(out.flatten(0, 1)[others], tensors[0].flatten(0, 1)[others])
        before = tensors[0].clone()
        in_place = aligned(ops.aligned_residual_read_, index, norm, backend="cpu")
        assert in_place(before, *tensors[1:]) is before
        assert torch.equal(before, out)


def test_values_out_of_bounds_are_named():
    hidden, token, state, weights, params = turn()
    rest = [MemoryState.from_weights([w.float() for w in weights])]
    rest.append(ops.ReadParams(*(p.float() for p in params)))
    for index, message in (
        ((token * 0, state), "token_index: got the same position twice"),
        ((token + 8, state), r"token_index: .* expected values in \[0, 18\)"),
        ((token, state - 1), r"state_index: got -1 to"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ops.aligned_residual_read(hidden.float(), *index, *rest, backend="cpu")
    inputs = make_inputs(dtype=torch.float32)
    for name, value in (("lr", -1e-3), ("lr", torch.inf), ("momentum", 1.1), ("decay", torch.nan)):
        bad = getattr(inputs, name).clone()
        bad[-1, -1, -1] = value
        *args, options = inputs._replace(**{name: bad})
        with pytest.raises(ArgumentError, match=f"{name}: got values from"):
            ops.neural_memory(*args, **options, backend="cpu")
    bad = inputs.momentum + 1
    with pytest.raises(ArgumentError, match="momentum: got values from"):
        ops.momentum_scan(inputs.q, bad, None, backend="cpu")


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    def leaf(x):
        return x.float().clone().requires_grad_(grad)

    inputs = make_inputs(lengths=[4, 0, 7], residual_norm=True)
    cu_seqlens, weights = inputs.options["cu_seqlens"], [leaf(w) for w in inputs.state.weights]
    read = (leaf(inputs.q), weights, cu_seqlens, "gelu", True, "cpu")
    opcheck(torch.ops.mal_kernels.memory_read.default, read)
    state = [leaf(torch.randn(3, *inputs.q.shape[2:])) for _ in range(2)]
    gates = (leaf(inputs.momentum), leaf(inputs.decay))
    scan = (leaf(inputs.q), *gates, state, cu_seqlens, "cpu")
    opcheck(torch.ops.mal_kernels.momentum_scan.default, scan)
    hidden, *index, weights, params = turn()
    lists = ([leaf(x) for x in weights], [leaf(x) for x in params])
    args = (leaf(hidden), *index, *lists, "gelu", False, "cpu")
    opcheck(torch.ops.mal_kernels.aligned_residual_read.default, args)


def test_an_operator_is_seen_by_whoever_looks_and_else_passed_by():
    """Profilers and modes meet the operator; a plain call of the same arguments gives its bits."""
    inputs = make_inputs(dtype=torch.float32)
    q, state = inputs.q, inputs.state
    plain = ops.memory_read(q, state)
    with torch.profiler.profile() as profile:
        assert torch.equal(ops.memory_read(q, state), plain)
    assert "mal_kernels::memory_read" in {event.name for event in profile.events()}
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.memory_read(mode.from_tensor(q), state.map(mode.from_tensor))
    assert fake.shape == plain.shape
    with pytest.raises(RuntimeError, match=r"vmap|[Bb]atching"):
        torch.vmap(lambda x: ops.memory_read(x, state))(q.unsqueeze(0))


def test_an_anchor_that_no_row_replaces_is_the_one_given():
    *args, state, options = make_inputs(tokens=5, chunk_size=16, dtype=torch.float32)
    inside = ops.neural_memory(*args, state, **options).state
    *more, _, _ = make_inputs(tokens=2, chunk_size=16, seed=1, dtype=torch.float32)
    before = [x.clone() for x in inside.anchor]
    new = ops.neural_memory(*more, inside, **options).state
    assert all(a is b for a, b in zip(new.anchor, inside.anchor, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(new.anchor, before, strict=True))
    leaves = inside.map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
    recorded = ops.neural_memory(*more, leaves, **options).state
    assert all(a is not b for a, b in zip(recorded.anchor, leaves.anchor, strict=True))


def test_what_it_does_not_serve_is_refused_in_words():
    inputs = make_inputs(depth=3, dtype=torch.float32)
    with pytest.raises(BackendUnavailable, match="depth 1 and 2, not 3"):
        ops.memory_read(inputs.q, inputs.state, backend="cpu")
    with pytest.raises(BackendUnavailable, match="float64"):
        ops.momentum_scan(inputs.q.double(), None, None, backend="cpu")
