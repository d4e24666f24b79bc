"""The registered operators: parity, opcheck, torch.compile, autocast, backends and bad input."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from mal_kernels import ArgumentError, BackendUnavailable, MemoryState, ops
from mal_kernels._cpu import library
from mal_kernels.call import MemoryCall
from mal_kernels.testing import assert_parity, closed_form, make_inputs, results

portable = functools.partial(ops.neural_memory, backend="reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "plain": dict(),
    "linear": dict(depth=1),
    "deep": dict(depth=3, activation="silu"),
    "norm": dict(residual_norm=True, init=True, max_grad_norm=0.5),
    "one chunk": dict(chunk_size=None),
    "chunk steps": dict(step="chunk"),
    "turns": dict(step="chunk", chunk_size=None, lengths=[9, 0, 28, 1], init=True),
    "inside a chunk": dict(position=True, edges=True),
    "ragged": dict(lengths=[5, 0, 17, 1]),
    "no gates": dict(gates=False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    assert_parity(portable, make_inputs(dtype=dtype, **CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_update_is_the_write_of_neural_memory(case):
    *args, options = make_inputs(**CASES[case])
    whole, write = ops.neural_memory(*args, **options), ops.memory_update(*args[1:], **options)
    # two computations, in float64: rounding is all that may lie between them
    torch.testing.assert_close(write.surprise, whole.surprise)
    for a, b in zip(write.state.tensors(), whole.state.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_same_bits_twice():
    inputs = make_inputs(dtype=torch.float32)
    first, second = (results(portable, inputs) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


# --- registration ---------------------------------------------------------------------------------


def operator_arguments(inputs, reads=True):
    tokens = [*inputs[:6]] if reads else [None, *inputs[1:6]]
    return *MemoryCall.of(tokens, inputs.state, **inputs.options), "reference"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_opcheck_neural_memory(case, grad):
    inputs = make_inputs(tokens=9, chunk_size=4, dtype=torch.float32) if case == "plain" else None
    inputs = inputs or make_inputs(dtype=torch.float32, **CASES[case])
    inputs = inputs.map(lambda t: t.clone().requires_grad_(grad))
    for reads in (True, False):
        opcheck(torch.ops.mal_kernels.neural_memory.default, operator_arguments(inputs, reads))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck_the_others(ragged, grad):
    inputs = make_inputs(lengths=[4, 0, 7] if ragged else None, dtype=torch.float32)
    inputs = inputs.map(lambda t: t.clone().requires_grad_(grad))
    cu_seqlens = inputs.options.get("cu_seqlens")
    weights = list(inputs.state.weights)
    # opcheck wants dense, possibly permuted, inputs to work too
    q = inputs.q.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_(grad)
    read = (q, weights, cu_seqlens, "gelu", False, "reference")
    opcheck(torch.ops.mal_kernels.memory_read.default, read)
    for momentum, state in itertools.product((inputs.momentum, None), (True, False)):
        initial = [torch.randn(len(weights[0]), *q.shape[2:]) for _ in range(2)] if state else []
        scan = (q, momentum, inputs.decay, initial, cu_seqlens, "reference")
        opcheck(torch.ops.mal_kernels.momentum_scan.default, scan)
    hidden, params = aligned(inputs.state, grad)
    index = (torch.tensor([1, 2, 9]), torch.tensor([0, 1, 1]))
    args = (hidden, *index, weights, list(params), "gelu", False, "reference")
    opcheck(torch.ops.mal_kernels.aligned_residual_read.default, args)


def aligned(state, grad=False):
    inner = state.weights[0].shape[1] * state.weights[0].shape[2]
    shapes = [(10,), (inner, 10), (inner, 10), (10, inner)]
    params = [torch.randn(s, requires_grad=grad) for s in shapes]
    return torch.randn(2, 6, 10, requires_grad=grad), ops.ReadParams(*params)


def test_compiles_whole_with_dynamic_shapes():
    def layer(q, k, v, lr, momentum, decay, weights):
        state = MemoryState.from_weights(weights)
        out = portable(q, k, v, lr, momentum, decay, state, chunk_size=4)
        again = portable(None, k, v, lr, momentum, decay, out.state, chunk_size=4)
        return out.output + ops.memory_read(q, again.state), again.surprise, again.state.weights

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (8, 9, 14):
        *args, state, _ = make_inputs(tokens=tokens, dtype=torch.float32).map(
            lambda t: t.clone().requires_grad_()
        )
        values, grads = [], []
        for f in (layer, compiled):
            output, surprise, weights = f(*args, state.weights)
            loss = output.sum() + surprise.sum() + sum(w.sum() for w in weights)
            values.append(output)
            grads.append(torch.autograd.grad(loss, [*args, *state.weights]))
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*grads)


def test_compiles_scan_and_aligned_read():
    *_, state, _ = make_inputs(dtype=torch.float32)

    def function(update, gate, hidden, token, row, params):
        read = ops.aligned_residual_read(hidden, token, row, state, params)
        return ops.momentum_scan(update, gate, gate).weights, read

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, params = aligned(state)
    for n in (2, 3):
        update, gate = torch.randn(1, n, 2, 5), torch.rand(1, n, 2)
        token = torch.arange(n)
        args = (update, gate, hidden, token, token % 2, params)
        torch.testing.assert_close(compiled(*args), function(*args))


def test_autocast_stays_outside():
    *args, options = make_inputs(dtype=torch.float32)
    plain = ops.neural_memory(*args, **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.neural_memory(*args, **options)
    assert torch.equal(plain.output, inside.output)
    assert torch.equal(plain.state.weights[0], inside.state.weights[0])


def test_low_precision_tokens_keep_a_float32_state():
    *args, options = make_inputs(dtype=torch.bfloat16)
    out = ops.neural_memory(*args, **options)
    assert out.output.dtype == torch.bfloat16
    assert {t.dtype for t in (*out.state.weights, out.surprise)} == {torch.float32}


def test_memory_read_ragged_is_each_alone():
    inputs = make_inputs(lengths=[4, 0, 7], residual_norm=True)
    out = ops.memory_read(
        inputs.q, inputs.state, residual_norm=True, cu_seqlens=inputs.options["cu_seqlens"]
    )
    for row, part in ((0, slice(0, 4)), (2, slice(4, 11))):
        one = inputs.state.index_select(torch.tensor([row]))
        alone = ops.memory_read(inputs.q[:, part], one, residual_norm=True)
        torch.testing.assert_close(out[:, part], alone)


def test_aligned_read_leaves_other_rows_alone():
    *_, state, _ = make_inputs(dtype=torch.float32)
    hidden, params = aligned(state)
    hidden = hidden.bfloat16()
    token, row = torch.tensor([3, 4, 8]), torch.tensor([0, 0, 1])
    out = ops.aligned_residual_read(hidden, token, row, state, params)
    changed = (out != hidden).any(-1).flatten().nonzero().flatten()
    assert out.dtype == torch.bfloat16
    assert torch.equal(changed, token)
    zero = params._replace(w_out=torch.zeros_like(params.w_out))
    assert torch.equal(ops.aligned_residual_read(hidden, token, row, state, zero), hidden)


# --- backends -------------------------------------------------------------------------------------


def test_backends(monkeypatch):
    *args, state, options = make_inputs(dtype=torch.float32)
    assert ops.explain("memory_read")[0] == ("reference" if library.missing() else "cpu")
    for backend in ("triton", "cuda"):
        with pytest.raises(BackendUnavailable, match=f"{backend}.*reference"):
            ops.neural_memory(*args, state, **options, backend=backend)
    with pytest.raises(ArgumentError, match="backend: got 'tpu'"):
        ops.memory_read(args[0], state, backend="tpu")
    monkeypatch.setenv("MAL_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match="MAL_BACKEND"):
        ops.memory_read(args[0], state)
    ops.memory_read(args[0], state, backend="reference")  # what is asked for is served


def test_first_call_may_be_compiled():
    code = """
import torch
from mal_kernels import MemoryState, ops
weights = (torch.randn(1, 2, 4, 8), torch.randn(1, 2, 8, 4))
read = torch.compile(lambda q: ops.memory_read(q, MemoryState.from_weights(weights)),
                     fullgraph=True, backend="aot_eager")
assert read(torch.randn(1, 3, 2, 4)).shape == (1, 3, 2, 4)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- bad input ------------------------------------------------------------------------------------


Q, K, V, LR, MOMENTUM, DECAY, STATE = range(7)


def swap(i, f):
    """Replaces argument ``i`` by a function of it."""
    return lambda args, options: args.__setitem__(i, f(args[i]))


def option(**values):
    return lambda args, options: options.update(values)


def field(**change):
    """Replaces fields of the state by functions of it."""
    return swap(STATE, lambda s: s._replace(**{name: f(s) for name, f in change.items()}))


@pytest.mark.parametrize(
    ("name", "change", "case"),
    [
        ("k", swap(K, lambda x: x[0]), {}),
        ("k", swap(K, torch.Tensor.long), {}),
        ("v", swap(V, lambda x: x[:, 1:]), {}),
        ("q", swap(Q, torch.Tensor.double), {}),
        ("lr", swap(LR, lambda x: x[..., :1]), {}),
        ("lr", swap(LR, torch.Tensor.neg), {}),
        ("lr", swap(LR, lambda x: x * torch.inf), {}),
        ("momentum", swap(MOMENTUM, lambda x: x + 1), {}),
        ("momentum", swap(MOMENTUM, lambda x: x * torch.nan), {}),
        ("momentum", swap(MOMENTUM, lambda x: x[:, :2]), dict(step="chunk")),
        ("decay", swap(DECAY, lambda x: x - 1), {}),
        ("decay", swap(DECAY, lambda x: x[:, 1:]), dict(step="chunk", lengths=[9, 20])),
        ("state", swap(STATE, lambda s: None), {}),
        ("state.weights", swap(STATE, lambda s: MemoryState((), ())), {}),
        ("state.weights[0]", swap(STATE, lambda s: s.index_select(torch.tensor([0]))), {}),
        ("state.weights[0]", swap(STATE, lambda s: s.map(torch.Tensor.bfloat16)), {}),
        ("state.momentum", field(momentum=lambda s: ()), {}),
        ("state", field(anchor=lambda s: s.weights), {}),
        ("state", option(chunk_size=None), dict(position=True)),
        ("state.position", field(position=lambda s: s.position + 8), dict(position=True)),
        ("init", option(init=[]), {}),
        ("init[0]", option(init=[torch.zeros(1), torch.zeros(1)]), {}),
        ("step", option(step="turn"), {}),
        ("chunk_size", option(chunk_size=0), {}),
        ("max_grad_norm", option(max_grad_norm=0.0), {}),
        ("activation", option(activation="tanh"), {}),
        ("cu_seqlens", option(cu_seqlens=torch.tensor([0, 23])), {}),
        ("cu_seqlens", option(cu_seqlens=torch.tensor([0, 5, 3, 9])), dict(lengths=[1, 4, 4])),
        ("cu_seqlens", option(cu_seqlens=torch.tensor([0.0, 9.0])), dict(lengths=[9])),
    ],
)
def test_bad_input_names_the_argument(name, change, case):
    *args, options = make_inputs(dtype=torch.float32, **case)
    change(args, options)
    with pytest.raises(ArgumentError, match=f"^{re.escape(name)}: got .*, expected "):
        ops.neural_memory(*args, **options)


def test_bad_input_of_the_aligned_read():
    *_, state, _ = make_inputs(dtype=torch.float32)
    hidden, params = aligned(state)
    token = torch.tensor([3, 4, 8])

    def call(hidden=hidden, token=token, row=token % 2, params=params):
        return ops.aligned_residual_read(hidden, token, row, state, params)

    call()
    for name, change in {
        "hidden": dict(hidden=hidden[0]),
        "token_index": dict(token=token.float()),
        "token_index: got 3 to 99": dict(token=torch.tensor([3, 4, 99])),
        "token_index: got the same position twice": dict(token=torch.tensor([3, 4, 3])),
        "state_index": dict(row=token[:2]),
        "state_index: got -1": dict(row=torch.tensor([0, -1, 1])),
        "params.w_out": dict(params=params._replace(w_out=params.w_q)),
    }.items():
        with pytest.raises(ArgumentError, match=name):
            call(**change)


def test_bad_input_of_the_scan():
    update, gate = torch.randn(1, 3, 2, 5), torch.rand(1, 3, 2)
    state = MemoryState((torch.zeros(1, 2, 5),), (torch.zeros(1, 2, 5),))
    with pytest.raises(ArgumentError, match="update"):
        ops.momentum_scan(update.long(), gate, gate)
    with pytest.raises(ArgumentError, match="decay"):
        ops.momentum_scan(update, gate, gate[:, :2])
    with pytest.raises(ArgumentError, match="momentum: got values"):
        ops.momentum_scan(update, gate + 1, gate)
    with pytest.raises(ArgumentError, match=r"state.weights\[0\]"):
        ops.momentum_scan(update[:, :, :1], gate[:, :, :1], None, state)


def test_reference_and_op_agree_on_what_is_a_state():
    *args, options = make_inputs(tokens=16)
    assert closed_form(*args, **options).state.position is None
    assert ops.neural_memory(*args, **options).state.position is None
    assert ops.neural_memory(*[x[:, :3] for x in args[:6]], args[6], **options).state.anchor
