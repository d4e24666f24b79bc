"""The Triton kernels of write and causal read, values and gradients: interpreted, or on a GPU."""

from __future__ import annotations

import functools
import itertools
import os

import pytest
import torch
from torch.library import opcheck

from mal_kernels import ArgumentError, BackendUnavailable, MemoryState, ops, reference
from mal_kernels.memory import NeuralMemory
from mal_kernels.testing import assert_parity, make_inputs, results

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs the interpreter, TRITON_INTERPRET=1, or a GPU", allow_module_level=True)

if INTERPRETED:
    from mal_kernels.testing import interpreter

    interpreter.install()
else:
    pytestmark = pytest.mark.gpu

DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = dict(batch=1, heads=1, tokens=11, chunk_size=4)
CASES = {
    "plain": SMALL,
    "linear": dict(SMALL, depth=1, activation="silu"),
    "norm": dict(SMALL, heads=2, residual_norm=True, init=True, max_grad_norm=0.5),
    "linear norm": dict(SMALL, depth=1, residual_norm=True, init=True, max_grad_norm=0.3),
    "several slices": dict(SMALL, hidden=70, head_dim=20, activation="gelu_tanh"),
    "wide heads": dict(SMALL, tokens=6, head_dim=64, hidden=40),
    "chunks of two tiles": dict(SMALL, tokens=50, chunk_size=24),
    "a chunk of several tiles": dict(SMALL, tokens=37, chunk_size=None, init=True),
    "chunks longer than are walked": dict(SMALL, tokens=140, chunk_size=130),
    "chunk steps": dict(SMALL, batch=2, step="chunk", activation="relu"),
    "chunk steps, norm": dict(SMALL, step="chunk", residual_norm=True, max_grad_norm=0.1),
    "chunk steps, linear": dict(SMALL, step="chunk", depth=1, residual_norm=True),
    "ragged chunk steps": dict(heads=1, step="chunk", chunk_size=4, lengths=[3, 0, 9], gates=False),
    "turns": dict(heads=1, step="chunk", chunk_size=None, lengths=[3, 0, 18, 1], init=True),
    "inside a chunk": dict(heads=1, tokens=9, batch=3, chunk_size=6, position=True, edges=True),
    "ragged": dict(heads=1, chunk_size=4, lengths=[5, 0, 2], position=True),
    "ragged, norm": dict(heads=1, chunk_size=4, lengths=[1, 6], residual_norm=True, edges=True),
    "edges": dict(SMALL, edges=True, init=True, seed=1),
    "no gates": dict(SMALL, gates=False),
    "one token": dict(SMALL, tokens=1),
}  # fmt: skip
HALF = ["plain", "norm", "linear", "chunk steps"]


def moved(x, device):
    """Every tensor of a nested argument on ``device``."""
    if isinstance(x, (list, tuple)):
        parts = [moved(y, device) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x.to(device) if isinstance(x, torch.Tensor) else x


def on_device(op):
    """``op`` of the Triton backend, run on DEVICE for tensors that stay on the CPU."""

    @functools.wraps(op)
    def run(*args, **options):
        options = {name: moved(x, DEVICE) for name, x in options.items()}
        return moved(op(*moved(args, DEVICE), **options, backend="triton"), "cpu")

    return run


memory, update = on_device(ops.neural_memory), on_device(ops.memory_update)


@pytest.mark.parametrize("case", CASES)
def test_parity(case):
    assert_parity(memory, make_inputs(dtype=torch.float32, **CASES[case]))


@pytest.mark.parametrize("case", HALF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parity_of_half_precision(case, dtype):
    assert_parity(memory, make_inputs(dtype=dtype, **CASES[case]))


@pytest.mark.parametrize("chunk_size", [32, 64])
def test_parity_of_full_tiles(chunk_size):
    inputs = make_inputs(batch=1, heads=1, tokens=260, chunk_size=chunk_size, dtype=torch.bfloat16)
    assert_parity(memory, inputs)


@pytest.mark.parametrize("case", ["norm", "turns"])
def test_update_is_the_write(case):
    inputs = make_inputs(dtype=torch.float32, **CASES[case])

    def write(q, *args, **options):
        state, surprise = update(*args, **options)
        return ops.NeuralMemoryOutput(q, state, surprise)

    whole, alone = results(memory, inputs), results(write, inputs)
    for name in ("surprise", "weights[0]", "momentum[0]"):
        assert torch.equal(whole[name], alone[name])

    def reference(q, *args, **options):
        state, surprise = ops.memory_update(*args, **options, backend="reference")
        return ops.NeuralMemoryOutput(q, state, surprise)

    for name, golden in results(reference, inputs.to(torch.float64)).items():
        torch.testing.assert_close(alone[name].double(), golden, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("spacing", "case", "segments"),
    [
        (1, "linear norm", 3),
        (2, "plain", 2),
        (9, "plain", 1),
        (1, "inside a chunk", 2),
        (1, "ragged", 2),
        (1, "chunk steps", 3),
        (1, "ragged chunk steps", 1),  # its chunks end in different places
    ],
)
def test_parity_with_checkpoints(spacing, case, segments, monkeypatch):
    from mal_kernels._triton import neural_memory

    walked, segment_bwd = [], neural_memory.segment_bwd

    def segment(*args):
        walked.append(args)
        return segment_bwd(*args)

    monkeypatch.setenv("MAL_CHECKPOINT_SPACING", str(spacing))
    monkeypatch.setattr(neural_memory, "segment_bwd", segment)
    assert_parity(memory, make_inputs(dtype=torch.float32, **CASES[case]))
    assert len(walked) == segments


@pytest.mark.parametrize("spacing", ["0", "two"])
def test_checkpoint_spacing_is_a_number_of_chunks(spacing, monkeypatch):
    monkeypatch.setenv("MAL_CHECKPOINT_SPACING", spacing)
    inputs = make_inputs(dtype=torch.float32, **SMALL)
    with pytest.raises(ArgumentError, match="MAL_CHECKPOINT_SPACING"):
        results(memory, inputs)


# --- behaviour ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(1, 10), (4, 7), (5, 3, 3)])
def test_split_anywhere_is_the_whole(tokens):
    *args, state, options = make_inputs(dtype=torch.float32, residual_norm=True, **SMALL)
    whole = memory(*args, state, **options)
    outputs = []
    marks = [0, *itertools.accumulate(tokens)]
    for begin, end in itertools.pairwise(marks):
        out = memory(*(x[:, begin:end] for x in args), state, **options)
        state = out.state
        outputs.append(out.output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output, rtol=1e-5, atol=1e-6)
    for a, b in zip(state.weights, whole.state.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_past_does_not_see_the_future():
    *args, options = make_inputs(dtype=torch.float32, **SMALL)
    before = memory(*args, **options).output
    for x in args[:6]:
        x[:, 6:] = torch.rand_like(x[:, 6:])
    after = memory(*args, **options).output
    assert torch.equal(after[:, :6], before[:, :6])
    assert not torch.equal(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("case", ["plain", "a chunk of several tiles"])
def test_same_bits_twice(case):
    inputs = make_inputs(dtype=torch.float32, **CASES[case])
    first, second = (results(memory, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_write_rate_of_zero_leaves_the_memory_alone():
    inputs = make_inputs(dtype=torch.float32, gates=False, **SMALL)
    out = memory(*inputs._replace(lr=torch.zeros_like(inputs.lr))[:7], **inputs.options)
    assert all(map(torch.equal, out.state.weights, inputs.state.weights))
    assert not out.state.momentum[0].any()


def test_no_tokens_leave_the_gradients_whole():
    inputs = make_inputs(dtype=torch.float32, batch=2, heads=1, tokens=0, step="chunk")
    found = results(memory, inputs)
    for name, golden in results(reference.recurrence, inputs.to(torch.float64)).items():
        torch.testing.assert_close(found[name].double(), golden)


def test_no_tokens_and_no_rows():
    *args, state, options = make_inputs(dtype=torch.float32, **SMALL)
    none = memory(*(x[:, :0] for x in args), state, **options)
    assert none.output.shape == args[0][:, :0].shape
    assert all(map(torch.equal, none.state.weights, state.weights))
    rowless = memory(*(x[:0] for x in args), state.index_select(torch.tensor([]).long()), **options)
    assert rowless.state.weights[0].shape[0] == 0


# --- registration ---------------------------------------------------------------------------------


def test_opcheck():
    inputs = make_inputs(dtype=torch.float32, heads=1, lengths=[2, 4], chunk_size=4)
    inputs = inputs.map(lambda t: t.to(DEVICE).requires_grad_())
    q, k, v, lr, momentum, decay, state, o = inputs
    operands = (
        *(q, k, v, lr, momentum, decay),
        *(list(state.weights), list(state.momentum), list(state.anchor or ()), []),
        *(state.position, moved(o["cu_seqlens"], DEVICE), o["chunk_size"], o["step"]),
        *(o["activation"], o["residual_norm"], o["max_grad_norm"], "triton"),
    )
    opcheck(torch.ops.mal_kernels.neural_memory.default, operands)


def test_compiles_whole_and_ignores_autocast():
    *args, _ = make_inputs(dtype=torch.float32, **SMALL)

    def function(*args):
        return memory(*args, chunk_size=4).output

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(compiled(*args), function(*args))


@pytest.mark.parametrize("step", ["token", "chunk"])
def test_the_layer_runs_on_it_unchanged(step, monkeypatch):
    layer = NeuralMemory(16, heads=1, head_dim=16, step=step, chunk_size=8).to(DEVICE)
    hidden = torch.randn(2, 11, 16, device=DEVICE)
    outputs = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("MAL_BACKEND", backend)
        output, state = layer(hidden)
        output, _ = layer(hidden, state)
        gradients = torch.autograd.grad(output.sum(), [*layer.parameters()], allow_unused=True)
        outputs.append([output, *(g for g in gradients if g is not None)])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_limits_are_named():
    inputs = make_inputs(dtype=torch.float32, depth=3)
    with pytest.raises(BackendUnavailable, match="depth"):
        memory(*inputs[:7], **inputs.options)
    double = make_inputs()
    with pytest.raises(BackendUnavailable, match="float64"):
        memory(*double[:7], **double.options)


# --- teeth ----------------------------------------------------------------------------------------


def late_decay(q, k, v, lr, momentum, decay, state, **options):
    shifted = torch.cat([decay[:, :1], decay[:, :-1]], 1)
    return memory(q, k, v, lr, momentum, shifted, state, **options)


def dropped_token(q, k, v, lr, momentum, decay, state, **options):
    mask = torch.ones_like(lr)
    mask[:, -1] = 0
    return memory(q, k, v, lr * mask, momentum, decay, state, **options)


def momentum_reset(*args, **options):
    *args, state = args
    outputs, surprises = [], []
    for begin in range(0, args[1].shape[1], options["chunk_size"]):
        part = [x[:, begin : begin + options["chunk_size"]] for x in args]
        state = MemoryState.from_weights(state.weights) if begin else state
        output, state, surprise = memory(*part, state, **options)
        outputs.append(output)
        surprises.append(surprise)
    return ops.NeuralMemoryOutput(torch.cat(outputs, 1), state, torch.cat(surprises, 1))


@pytest.mark.parametrize("wrong", [late_decay, dropped_token, momentum_reset])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_planted_bugs_are_seen(wrong, dtype):
    inputs = make_inputs(batch=1, heads=1, tokens=32, chunk_size=16, max_lr=0.2, dtype=dtype)
    with pytest.raises(AssertionError, match="of budget"):
        assert_parity(wrong, inputs)
