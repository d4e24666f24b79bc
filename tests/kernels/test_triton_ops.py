"""The Triton kernels within the budgets of the reference: interpreted on a CPU, or on a GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.library import opcheck

from mal_kernels import (
    ArgumentError,
    BackendUnavailable,
    MemoryState,
    NeuralMemory,
    ops,
    reference,
)
from mal_kernels.call import AlignedCall
from mal_kernels.testing import make_inputs
from tests.support.parity import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    assert_same,
    counted_launches,
    values_and_gradients,
)

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def on_device(op):
    """``op`` run on DEVICE for tensors that stay on the CPU."""

    @functools.wraps(op)
    def run(*tensors):
        out = op(*(t.to(DEVICE) for t in tensors))
        return out.cpu() if isinstance(out, torch.Tensor) else tuple(x.cpu() for x in out)

    return run


# --- memory_read ----------------------------------------------------------------------------------

READS = {
    "plain": dict(tokens=23, head_dim=8, hidden=12),
    "one token": dict(tokens=1),
    "silu, several slices": dict(tokens=19, head_dim=24, hidden=70, activation="silu"),
    "gelu_tanh, norm": dict(activation="gelu_tanh", residual_norm=True, hidden=40),
    "relu, ragged": dict(activation="relu", lengths=[5, 0, 17, 1, 33]),
    "norm, ragged": dict(residual_norm=True, lengths=[40, 3], hidden=32, head_dim=16),
    "linear": dict(depth=1, head_dim=40),
    "linear, norm, ragged": dict(depth=1, head_dim=20, lengths=[7, 30], residual_norm=True),
    "no tokens": dict(tokens=0),
}


def read(case):
    """The op and its reference as functions of ``q`` and weights, and these tensors."""
    inputs = make_inputs(**case)
    o = inputs.options
    options = {n: o.get(n) for n in ("activation", "residual_norm", "cu_seqlens")}

    cu_seqlens = options["cu_seqlens"]
    there = options | dict(cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(DEVICE))

    @on_device
    def op(q, *weights):
        return ops.memory_read(q, MemoryState(weights, weights), backend="triton", **there)

    def golden(q, *weights):
        return reference.memory_read(q, MemoryState(weights, weights), **options)

    return op, golden, [inputs.q, *inputs.state.weights]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", READS)
def test_memory_read(case, dtype):
    op, golden, (q, *weights) = read(READS[case])
    assert_same(op, golden, [q.to(dtype), *(w.float() for w in weights)], dtype)


def test_memory_read_of_real_turns():
    op, golden, (q, *weights) = read(dict(lengths=[112, 28], heads=4, head_dim=64, hidden=128))
    tensors = [q.bfloat16(), *(w.float() for w in weights)]
    assert_same(op, golden, tensors, torch.bfloat16)


# --- momentum_scan --------------------------------------------------------------------------------

SCANS = {
    "plain": dict(tokens=70),
    "no state": dict(state=False),
    "no momentum": dict(momentum=False),
    "no decay": dict(decay=False),
    "bare": dict(momentum=False, decay=False, state=False),
    "matrix, edges": dict(features=(5, 20), edges=True),
    "ragged": dict(lengths=[5, 0, 40, 1]),
    "no tokens": dict(tokens=0),
    "long": dict(tokens=260, features=(3,), heads=1),
}


def scan(
    tokens=37, features=(7,), heads=2, lengths=None, state=True, momentum=True, decay=True,
    edges=False
):  # fmt: skip
    g = torch.Generator().manual_seed(2)
    rows, batch, cu_seqlens = 2, 2, None
    if lengths:
        rows, batch, tokens = len(lengths), 1, sum(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    update = torch.randn(batch, tokens, heads, *features, generator=g)
    gates = torch.randn(2, batch, tokens, heads, generator=g).sigmoid()
    if edges:
        gates[gates < 0.2], gates[gates > 0.8] = 0.0, 1.0
    initial = torch.randn(2, rows, heads, *features, generator=g)
    given = [*gates[: momentum + decay]]
    tensors = [update, *given, *(initial if state else ())]

    def call(function, update, *rest, **options):
        rest = list(rest)
        eta, alpha = (rest.pop(0) if has else None for has in (momentum, decay))
        start = MemoryState((rest[0],), (rest[1],)) if rest else None
        bounds = None if cu_seqlens is None else cu_seqlens.to(update.device)
        return function(update, eta, alpha, start, cu_seqlens=bounds, **options)

    @on_device
    def op(*tensors):
        return call(ops.momentum_scan, *tensors, backend="triton")

    return op, lambda *tensors: call(reference.momentum_scan, *tensors), tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SCANS)
def test_momentum_scan(case, dtype):
    op, golden, tensors = scan(**SCANS[case])
    n_tokens = len(tensors) - 2 * SCANS[case].get("state", True)
    tensors = [t.to(dtype) if i < n_tokens else t for i, t in enumerate(tensors)]
    assert_same(op, golden, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "no state", "no momentum", "no decay", "matrix, edges"])
def test_momentum_scan_in_segments(case, dtype, monkeypatch):
    from mal_kernels._triton import momentum_scan

    monkeypatch.setattr(momentum_scan, "segment_length", lambda update: 16)
    test_momentum_scan(case, dtype)


def test_long_sequences_are_cut():
    from mal_kernels._triton.momentum_scan import segment_length

    assert segment_length(torch.empty(1, 100_000, 4, device="meta")) == 2048
    assert segment_length(torch.empty(1, 4095, 4, device="meta")) is None
    assert segment_length(torch.empty(1, 100_000, 4, 64, 64, device="meta")) is None


# --- aligned_residual_read ------------------------------------------------------------------------

ALIGNED = {
    "one turn": dict(index=[3, 4, 5, 11], state=[0, 0, 0, 1]),
    "unsorted states": dict(index=[*range(2, 34)], state=[i % 3 for i in range(32)], rows=4),
    "norm": dict(index=[0, 39, 7], state=[2, 0, 2], rows=3, residual_norm=True, activation="silu"),
    "linear": dict(index=[1, 2, 3], state=[0, 1, 1], depth=1, head_dim=20),
    "wide": dict(index=[*range(20)], state=[1] * 20, width=150, head_dim=24, hidden=40),
    "no audio": dict(index=[], state=[]),
}


def aligned(index, state, width=20, rows=2, activation="gelu", residual_norm=False, **memory):
    """The op and its reference as functions of ``hidden``, weights and parameters, and these."""
    options = dict(activation=activation, residual_norm=residual_norm)
    inputs = make_inputs(batch=rows, tokens=1, residual_norm=residual_norm, **memory)
    weights = inputs.state.weights
    inner = weights[0].shape[1] * weights[0].shape[2]
    g = torch.Generator().manual_seed(3)
    hidden = 3 * torch.randn(2, 20, width, generator=g)
    shapes = [(width,), (inner, width), (inner, width), (width, inner)]
    params = [torch.randn(s, generator=g) / s[-1] ** 0.5 for s in shapes]
    index, state = (torch.tensor(x, dtype=torch.int64) for x in (index, state))

    def call(function, hidden, *tensors, **more):
        memory = MemoryState(tensors[:-4], tensors[:-4])
        params = ops.ReadParams(*tensors[-4:])
        at = (x.to(hidden.device) for x in (index, state))
        return function(hidden, *at, memory, params, **options, **more)

    @on_device
    def op(*tensors):
        return call(ops.aligned_residual_read, *tensors, backend="triton")

    def golden(*tensors):
        return call(reference.aligned_residual_read, *tensors)

    return op, golden, [hidden, *(w.float() for w in weights), *params]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALIGNED)
def test_aligned_residual_read(case, dtype):
    op, golden, (hidden, *tensors) = aligned(**ALIGNED[case])
    assert_same(op, golden, [hidden.to(dtype), *tensors], dtype)


def turn_of(case="one turn"):
    """Arguments of both forms of the aligned read, on DEVICE."""
    spec = ALIGNED[case]
    _, _, (hidden, *tensors) = aligned(**spec)
    hidden, *tensors = (t.to(DEVICE) for t in (hidden, *tensors))
    index = (torch.tensor(spec[n], dtype=torch.int64, device=DEVICE) for n in ("index", "state"))
    params = ops.ReadParams(*tensors[-4:])
    state = MemoryState(tuple(tensors[:-4]), tuple(tensors[:-4]))
    return hidden, *index, state, params


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("case", ["one turn", "unsorted states", "no audio"])
def test_aligned_residual_read_in_place(case, backend):
    hidden, token_index, *rest = turn_of(case)
    before = hidden.clone()
    out = ops.aligned_residual_read(hidden, token_index, *rest, backend=backend)
    assert torch.equal(hidden, before)
    changed = (out != hidden).any(-1).flatten().nonzero().flatten()
    assert torch.equal(changed, token_index.sort().values)
    assert ops.aligned_residual_read_(hidden, token_index, *rest, backend=backend) is hidden
    assert torch.equal(hidden, out)


@pytest.mark.parametrize("in_place", [True, False])
def test_launches_of_the_aligned_residual_read(in_place):
    from mal_kernels._triton.aligned_residual_read import aligned_fwd

    hidden, *index, state, params = turn_of("one turn")
    call = AlignedCall(hidden, *index, list(state.weights), list(params), "gelu", False)
    aligned_fwd(call)  # compiles
    with counted_launches() as count:
        aligned_fwd(call, in_place=in_place)
    kernels = ("aligned_project_kernel", "aligned_read_kernel", "aligned_add_kernel")
    assert all(count.pop(name) == 1 for name in kernels)
    assert count.total() == (0 if in_place else 1)  # the copy of hidden


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_aligned_residual_read_in_place_refuses(backend):
    hidden, *rest, params = turn_of()
    before = hidden.clone()
    trained = params._replace(norm=params.norm.clone().requires_grad_())
    for h, p in ((hidden.clone().requires_grad_(), params), (hidden, trained)):
        with pytest.raises(ArgumentError, match=r"hidden: .* records gradients.*no_grad"):
            ops.aligned_residual_read_(h, *rest, p, backend=backend)
    with pytest.raises(ArgumentError, match="hidden: got strides"):
        ops.aligned_residual_read_(hidden.mT.contiguous().mT, *rest, params, backend=backend)
    short = params._replace(norm=params.norm[1:])
    with pytest.raises(ArgumentError, match=r"params\.norm"):
        ops.aligned_residual_read_(hidden, *rest, short, backend=backend)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_aligned_residual_read_in_place_is_registered(backend):
    hidden, token_index, state_index, state, params = turn_of()
    index = (token_index, state_index)
    args = (hidden.clone(), *index, list(state.weights), list(params), "gelu", False, backend)
    opcheck(torch.ops.mal_kernels.aligned_residual_read_.default, args)

    def function(hidden):
        hidden = hidden + 1
        return ops.aligned_residual_read_(hidden, *index, state, params, backend=backend) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), function(hidden))


def test_the_module_reads_through_triton(monkeypatch):
    memory = NeuralMemory(48, heads=2, head_dim=16).to(DEVICE)
    torch.nn.init.normal_(memory.to_out.weight)
    hidden, index = torch.randn(2, 10, 48, device=DEVICE), torch.tensor([3, 4, 12], device=DEVICE)
    state = memory.initial_state(2)
    expected = memory.read(hidden, index, index // 10, state)
    monkeypatch.setenv("MAL_BACKEND", "triton")
    torch.testing.assert_close(memory.read(hidden, index, index // 10, state), expected)


# --- autotuning -----------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """The launches that autotuning times, of which it finds the second fastest."""
    from mal_kernels._triton import autotune

    calls = []

    def milliseconds(tokens, launch):
        launch()
        calls.append(launch)
        return len(calls) != 2

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr(autotune, "_fastest", {})
    return calls


def test_nothing_is_timed_unless_asked(timed):
    op, _, tensors = read(READS["plain"])
    op(*(t.float() for t in tensors))
    assert not timed


@pytest.mark.parametrize("case", ["memory_read", "aligned_residual_read"])
def test_autotuning_times_once_a_size_and_changes_no_result(case, timed, monkeypatch):
    from mal_kernels._triton import autotune

    op, _, (x, *rest) = EVERY[case]()
    tensors = [x.bfloat16(), *(t.float() for t in rest)]
    pinned = op(*tensors)
    monkeypatch.setenv("MAL_AUTOTUNE", "1")
    for _ in range(2):
        torch.testing.assert_close(op(*tensors), pinned)
    ((key, chosen),) = autotune._fastest.items()
    choices = autotune.configurations(dict(key[2:]), torch.bfloat16)
    assert len(timed) == len(choices) >= 2
    assert chosen == choices[1] != choices[0]


def test_autotuning_in_place_adds_once(timed, monkeypatch):
    hidden, *rest = turn_of()
    hidden = hidden.bfloat16()
    expected = ops.aligned_residual_read(hidden, *rest, backend="triton")
    monkeypatch.setenv("MAL_AUTOTUNE", "1")
    ops.aligned_residual_read_(hidden, *rest, backend="triton")
    assert timed
    torch.testing.assert_close(hidden, expected)


# --- every op -------------------------------------------------------------------------------------

EVERY = {
    "memory_read": lambda: read(READS["norm, ragged"]),
    "memory_read linear": lambda: read(READS["linear"]),
    "momentum_scan": lambda: scan(**SCANS["ragged"]),
    "momentum_scan bare": lambda: scan(**SCANS["bare"]),
    "aligned_residual_read": lambda: aligned(**ALIGNED["norm"]),
}


def float_tensors(case):
    op, golden, tensors = EVERY[case]()
    return op, golden, [t.float() for t in tensors]


@pytest.mark.parametrize("case", EVERY)
def test_same_bits_twice(case):
    op, _, tensors = float_tensors(case)
    first, second = (values_and_gradients(op, tensors) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("case", EVERY)
def test_strided_tensors(case):
    op, _, tensors = float_tensors(case)
    strided = [t.movedim(0, -1).contiguous().movedim(-1, 0) for t in tensors]
    plain, other = (values_and_gradients(op, x) for x in (tensors, strided))
    assert all(torch.equal(plain[n], other[n]) for n in plain)


def test_strided_indices():
    def strided(x):
        return torch.stack([x, x + 1], -1)[..., 0]

    def run(change):
        inputs = make_inputs(lengths=[5, 9], dtype=torch.float32)
        cu_seqlens, q = change(inputs.options["cu_seqlens"].to(DEVICE)), inputs.q.to(DEVICE)
        state = inputs.state.to(DEVICE)
        yield ops.memory_read(q, state, cu_seqlens=cu_seqlens, backend="triton")
        yield from ops.momentum_scan(q, None, None, cu_seqlens=cu_seqlens, backend="triton")
        _, _, (hidden, *tensors) = aligned(index=[1, 2, 25], state=[0, 1, 1])
        index = (torch.tensor([1, 2, 25]), torch.tensor([0, 1, 1]))
        hidden, *tensors = (t.to(DEVICE) for t in (hidden, *tensors))
        yield ops.aligned_residual_read(
            *(hidden, *(change(x.to(DEVICE)) for x in index)),
            *(MemoryState(tensors[:-4], tensors[:-4]), ops.ReadParams(*tensors[-4:])),
            backend="triton",
        )

    for a, b in zip(run(strided), run(torch.clone), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", EVERY)
def test_compiles_whole(case):
    op, _, tensors = float_tensors(case)
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    plain, other = (values_and_gradients(f, tensors) for f in (op, compiled))
    assert all(torch.equal(plain[n], other[n]) for n in plain)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    def leaf(t):
        return t.float().to(DEVICE).clone().requires_grad_(grad)

    inputs = make_inputs(lengths=[4, 0, 7], residual_norm=True, dtype=torch.float32)
    cu_seqlens = inputs.options["cu_seqlens"].to(DEVICE)
    weights = [leaf(w) for w in inputs.state.weights]
    read_args = (leaf(inputs.q), weights, cu_seqlens, "gelu", True, "triton")
    opcheck(torch.ops.mal_kernels.memory_read.default, read_args)
    for momentum, has_state in ((leaf(inputs.momentum), True), (None, False)):
        state = [leaf(torch.randn(3, *inputs.q.shape[2:])) for _ in range(2)]
        args = (
            leaf(inputs.q),
            momentum,
            leaf(inputs.decay),
            state if has_state else [],
            cu_seqlens,
        )
        opcheck(torch.ops.mal_kernels.momentum_scan.default, (*args, "triton"))
    _, _, (hidden, *tensors) = aligned(index=[1, 2, 25], state=[0, 1, 1])
    tensors = [leaf(t) for t in tensors]
    index = (torch.tensor([1, 2, 25], device=DEVICE), torch.tensor([0, 1, 1], device=DEVICE))
    args = (leaf(hidden), *index, tensors[:-4], tensors[-4:], "gelu", False, "triton")
    opcheck(torch.ops.mal_kernels.aligned_residual_read.default, args)


def shifted_gate(update, *rest):
    """momentum of the previous token"""
    momentum = torch.cat([rest[0][:, :1], rest[0][:, :-1]], 1)
    return scan(**SCANS["plain"])[0](update, momentum, *rest[1:])


def other_slice(q, *weights):
    """one column of the hidden width left out"""
    weights = [weights[0], weights[1].clone()]
    weights[1][:, :, -1] = 0
    return read(READS["plain"])[0](q, *weights)


def other_state(hidden, *tensors):
    """the last token reads the state of the first"""
    case = ALIGNED["one turn"] | dict(state=[0, 0, 0, 0])
    return aligned(**case)[0](hidden, *tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("wrong", "case"),
    [
        (shifted_gate, scan(**SCANS["plain"])),
        (other_slice, read(READS["plain"])),
        (other_state, aligned(**ALIGNED["one turn"])),
    ],
)
def test_planted_bugs_are_seen(wrong, case, dtype):
    _, golden, (x, *tensors) = case
    with pytest.raises(AssertionError, match="of budget"):
        assert_same(wrong, golden, [x.to(dtype), *(t.float() for t in tensors)], dtype)


@pytest.mark.skipif(INTERPRETED, reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("case", EVERY)
def test_captured_in_a_cuda_graph(case):
    op, _, tensors = float_tensors(case)
    op, tensors = op.__wrapped__, [t.to(DEVICE) for t in tensors]
    expected = op(*tensors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*tensors)
    graph.replay()
    pairs = zip(*([x] if isinstance(x, torch.Tensor) else x for x in (out, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(not INTERPRETED, reason="about what a CPU cannot do")
def test_unavailable_names_the_limit(monkeypatch):
    def read_with(**case):
        inputs = make_inputs(**case)
        return ops.memory_read(inputs.q, inputs.state, backend="triton")

    with pytest.raises(BackendUnavailable, match="depth 1 and 2, not 3"):
        read_with(depth=3, dtype=torch.float32)
    with pytest.raises(BackendUnavailable, match="128 features a head, not 160"):
        read_with(head_dim=160, dtype=torch.float32)
    with pytest.raises(BackendUnavailable, match="float64"):
        read_with()
    with pytest.raises(BackendUnavailable, match="float64"):
        ops.momentum_scan(torch.ones(1, 2, 1).double(), None, None, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendUnavailable, match=r"tensors are on cpu.*TRITON_INTERPRET=1"):
        read_with(dtype=torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="not installed"):
        read_with(dtype=torch.float32)
