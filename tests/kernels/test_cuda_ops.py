"""The CUDA kernels within the budgets of the reference: emulated on the host, or on a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mal_kernels import BackendUnavailable, MemoryState, ops, reference
from mal_kernels._cuda import neural_memory
from mal_kernels.call import MemoryCall
from mal_kernels.testing import assert_within_budget, closed_form, low_precision, make_inputs
from mal_kernels.testing.emulation import devices


def every_case_and_dtype(cases, dtypes, few):
    """All cases in the first dtype, and the `few` in the others."""
    return [(case, dtypes[0]) for case in cases] + [(c, d) for d in dtypes[1:] for c in few]


device = devices("momentum_scan.cu", "neural_memory_fwd.cu")


def values_and_gradients(function, tensors):
    """Outputs of ``function`` and gradients of a fixed random loss, on the CPU."""
    tensors = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    out = function(**tensors)
    g = torch.Generator().manual_seed(1)
    noise = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in out]
    loss = sum((x * n.to(x)).sum() for x, n in zip(out, noise, strict=True))
    wanted = [*tensors.values()]  # a loop over no tokens uses none of them
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    named = {f"output {i}": x for i, x in enumerate(out)}
    named |= {f"grad {n}": d for n, d in zip(tensors, grads, strict=True)}
    return {n: x.detach().cpu() for n, x in named.items()}


# --- momentum_scan --------------------------------------------------------------------------------

SCANS = {
    "a group in time, vectors": dict(features=(256,), tokens=21),  # 128 threads take 512
    "three blocks of features": dict(features=(33, 32), tokens=11),
    "two groups, odd features": dict(features=(5, 45), tokens=37),
    "32 groups, one feature": dict(features=(), tokens=600, heads=1),
    "no state": dict(state=False),
    "no momentum": dict(gates=("decay",)),
    "no decay": dict(gates=("momentum",)),
    "bare": dict(gates=(), state=False),
    "gates of 0 and 1": dict(edges=True, features=(20,)),
    "ragged": dict(lengths=[5, 0, 70, 1], features=(64,)),
    "no tokens": dict(tokens=0),
}


def scan_tensors(
    tokens=37, features=(8,), heads=2, lengths=None, state=True, gates=("momentum", "decay"),
    edges=False,
):  # fmt: skip
    rows = batch = 2
    options = {}
    if lengths:
        rows, batch, tokens = len(lengths), 1, sum(lengths)
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = {"update": torch.randn(batch, tokens, heads, *features)}
    for name in gates:
        tensors[name] = torch.randn(batch, tokens, heads).sigmoid()
        if edges:
            tensors[name] = tensors[name].where(tensors[name] > 0.3, 0).where(
                tensors[name] < 0.7, 1
            )  # fmt: skip
    if state:
        tensors |= {n: torch.randn(rows, heads, *features) for n in ("weights", "trace")}
    return tensors, options


def scan(function, device="cpu", **options):
    """``function`` with its arguments by name, tokens on the CPU."""
    cu_seqlens = options.pop("cu_seqlens", None)

    def call(update, momentum=None, decay=None, weights=None, trace=None):
        state = None if weights is None else MemoryState((weights.to(device),), (trace.to(device),))
        tokens = [None if x is None else x.to(device) for x in (update, momentum, decay)]
        bounds = None if cu_seqlens is None else cu_seqlens.to(device)
        return function(*tokens, state, cu_seqlens=bounds, **options)

    return call


@pytest.mark.parametrize(
    ("case", "dtype"),
    every_case_and_dtype(
        SCANS,
        [torch.float32, torch.bfloat16, torch.float16],
        ["two groups, odd features", "a group in time, vectors", "ragged"],
    ),
)
def test_momentum_scan(case, dtype, device):
    tensors, options = scan_tensors(**SCANS[case])
    low = {
        n: t.to(dtype) if n in ("update", "momentum", "decay") else t for n, t in tensors.items()
    }
    actual = values_and_gradients(scan(ops.momentum_scan, device, backend="cuda", **options), low)
    high = {n: t.double() for n, t in low.items()}
    golden = values_and_gradients(scan(reference.momentum_scan, **options), high)
    for name, x in actual.items():
        # no product of matrices: the twin of a low precision is the golden itself
        twin = golden[name] if x.dtype != torch.float32 else None
        gradient = name.startswith("grad")
        assert_within_budget(name, x, golden[name], gradient=gradient, twin=twin, dtype=dtype)


def test_momentum_scan_of_unaligned_memory(device):
    update = torch.randn(1 + 2 * 9 * 1 * 64, device=device)[1:].view(2, 9, 1, 64)
    assert update.data_ptr() % 16
    gate = torch.rand(2, 9, 1, device=device)
    inputs = (update, gate, gate)
    expected = ops.momentum_scan(*inputs, backend="reference")
    for x, y in zip(ops.momentum_scan(*inputs, backend="cuda"), expected, strict=True):
        torch.testing.assert_close(x, y)


# --- neural_memory and memory_update --------------------------------------------------------------

CASES = {
    "chunk steps": dict(chunk_size=16, step="chunk"),
    "token steps": dict(chunk_size=16),
    "a turn: two tiles, clip, init": dict(
        tokens=112, heads=1, hidden=128, chunk_size=None, step="chunk", max_grad_norm=1.0,
        init=True, max_lr=0.01,
    ),
    "chunks longer than a tile, init": dict(
        tokens=130, heads=1, hidden=100, chunk_size=100, init=True
    ),
    "norm, clip, odd sizes": dict(
        head_dim=48, hidden=71, chunk_size=32, residual_norm=True, max_grad_norm=0.5
    ),
    "ragged chunk steps, norm": dict(
        lengths=[5, 0, 70], chunk_size=32, step="chunk", residual_norm=True, activation="silu"
    ),
    "ragged, inside a chunk": dict(
        lengths=[5, 0, 70], head_dim=16, hidden=24, chunk_size=32, position=True, activation="relu"
    ),
    "inside a chunk, norm, init": dict(
        chunk_size=100, position=True, residual_norm=True, batch=2, init=True
    ),
    "linear": dict(depth=1, chunk_size=32),
    "linear, norm, clip": dict(
        depth=1, head_dim=40, chunk_size=32, residual_norm=True, max_grad_norm=0.5
    ),
    "128 features, four blocks": dict(
        tokens=70, heads=1, head_dim=128, hidden=100, chunk_size=100, activation="gelu_tanh"
    ),
    "16 blocks": dict(tokens=6, heads=1, head_dim=128, hidden=500, residual_norm=True),
    "linear, 128 features": dict(
        tokens=70, heads=1, head_dim=128, depth=1, chunk_size=64, step="chunk"
    ),
    "gates of 0 and 1": dict(chunk_size=16, edges=True),
    "no gates": dict(chunk_size=16, gates=False),
    "no tokens": dict(tokens=0, chunk_size=16),
}  # fmt: skip


def memory_inputs(dtype=torch.bfloat16, **case):
    sizes = dict(tokens=40, batch=1, heads=2, head_dim=64, hidden=64)
    return make_inputs(**(sizes | case), dtype=dtype)


def written(function, inputs, device="cpu", **more):
    """What a write returns, by name, on the CPU; an anchor where it will be read."""
    return called(lambda q, *rest, **options: function(*rest, **options), inputs, device, **more)


def called(function, inputs, device="cpu", **more):
    """Likewise of the layer, with what it reads."""
    *given, state, options = inputs
    moved = [None if x is None else x.to(device) for x in given]
    state = state.map(lambda x: x.to(device))
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor)
        else [w.to(device) for w in x] if name == "init" and x else x
        for name, x in options.items()
    }  # fmt: skip
    with torch.no_grad():
        out = function(*moved, state, **options, **more)
    named = {"surprise": out.surprise}
    if isinstance(out, ops.NeuralMemoryOutput):
        named["output"] = out.output
    for field in ("weights", "momentum", "anchor"):
        for i, w in enumerate(getattr(out.state, field) or ()):
            named[f"{field}[{i}]"] = w if field != "anchor" else w[out.state.position > 0]
    if out.state.position is not None:
        named["position"] = out.state.position.double()
    return {name: x.cpu() for name, x in named.items()}


@pytest.mark.parametrize(
    ("case", "dtype"),
    every_case_and_dtype(
        CASES,
        [torch.bfloat16, torch.float16],
        ["token steps", "norm, clip, odd sizes", "128 features, four blocks"],
    ),
)
def test_neural_memory_and_memory_update(case, dtype, device):
    inputs = memory_inputs(dtype, **CASES[case])
    actual = called(ops.neural_memory, inputs, device, backend="cuda")
    golden = called(reference.recurrence, inputs.to(torch.float64))
    with low_precision(dtype):
        twin = called(closed_form, inputs.to(torch.float32))
    assert actual.keys() == golden.keys()
    for name, x in actual.items():
        assert_within_budget(name, x, golden[name], twin=twin[name], dtype=dtype)
    # to the bit, whether it reads or not
    for name, x in written(ops.memory_update, inputs, device, backend="cuda").items():
        assert torch.equal(x, actual[name]), name


def parts_of(inputs, *marks):
    """The arguments cut along T before each of ``marks``, without the state."""
    *tokens, _, options = inputs
    marks = (0, *marks, tokens[0].shape[1])
    return [([x[:, a:b] for x in tokens], options) for a, b in pairwise(marks)]


@pytest.mark.parametrize("marks", [(64, 128), (1, 40, 101)])
def test_a_stream_cut_anywhere_is_the_whole(marks, device):
    inputs = memory_inputs(tokens=130, chunk_size=128, heads=1, residual_norm=True)
    whole = called(ops.neural_memory, inputs, device, backend="cuda")
    state, outputs = inputs.state, []
    for tokens, options in parts_of(inputs, *marks):
        with torch.no_grad():
            given = [x.to(device) for x in tokens]
            state = state.map(lambda x: x.to(device))
            out = ops.neural_memory(*given, state, **options, backend="cuda")
        state = out.state
        outputs.append(out.output.cpu())
    parts = {"output": torch.cat(outputs, 1), "weights[0]": state.weights[0].cpu()}
    if marks == (64, 128):  # the same tiles: the state goes through memory and nothing is lost
        assert all(torch.equal(x, whole[name]) for name, x in parts.items())
        return
    golden = called(reference.recurrence, inputs.to(torch.float64))
    for name, x in parts.items():
        twin = whole[name]  # within the budget of Tier 1, as the whole is
        assert_within_budget(name, x, golden[name], twin=twin, dtype=torch.bfloat16)


@pytest.mark.parametrize("step", ["token", "chunk"])
def test_what_comes_later_changes_no_output(step, device):
    # from the seventh token of a chunk's second tile on
    inputs = memory_inputs(tokens=140, chunk_size=130, heads=1, step=step, max_grad_norm=1.0)
    before = called(ops.neural_memory, inputs, device, backend="cuda")["output"]
    for x in inputs[:4]:
        x[:, 70:] = x[:, 70:].flip(1)
    after = called(ops.neural_memory, inputs, device, backend="cuda")["output"]
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70], after[:, 70])


def test_states_before_tiles(device):
    # four tiles, in the slots from 1 on; a chunk ends after the third
    inputs = memory_inputs(tokens=140, chunk_size=130, heads=1, residual_norm=True)
    given = inputs.map(lambda x: x.to(device))
    tiles = [[w.new_full((6, *w.shape[1:]), 7.0) for w in x] for x in given.state[:2]]
    first = torch.ones(1, dtype=torch.int64, device=device)
    call = MemoryCall.of(given[:6], given.state, **given.options)
    neural_memory.memory_fwd(call, keeps=True, tiles=(*tiles, first))
    for slot, tokens in [(1, 0), (2, 64), (3, 128), (4, 130)]:
        cut = [x[:, :tokens] for x in inputs[:6]]
        before = written(ops.memory_update, (*cut, *inputs[6:]), device, backend="cuda")
        for i, (w, trace) in enumerate(zip(*tiles, strict=True)):
            assert torch.equal(w[slot].cpu(), before[f"weights[{i}]"][0])
            assert torch.equal(trace[slot].cpu(), before[f"momentum[{i}]"][0])
    assert all((w[[0, 5]] == 7).all() for x in tiles for w in x)


def test_the_same_bits_twice(device):
    inputs = memory_inputs(tokens=70, hidden=128, chunk_size=32, max_grad_norm=0.5)
    first, second = (called(ops.neural_memory, inputs, device, backend="cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


UNSERVED = {
    "float32": (dict(dtype=torch.float32), "takes float16 and bfloat16 tokens, not torch.float32"),
    "features": (dict(head_dim=20), "not depth 2, 20 features, 64 units"),
    "width": (dict(head_dim=128, hidden=513), "up to 512 hidden units; not"),
    "depth": (dict(depth=3), "not depth 3"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_writes_that_the_kernel_cannot_serve_are_refused(case, device):
    sizes, message = UNSERVED[case]
    with pytest.raises(BackendUnavailable, match=message):
        written(ops.memory_update, memory_inputs(**sizes), device, backend="cuda")


# --- what is refused everywhere -------------------------------------------------------------------


def test_what_the_kernels_cannot_serve_is_refused(device):
    with pytest.raises(BackendUnavailable, match="float64 is served by the reference"):
        ops.momentum_scan(torch.ones(1, 2, 1, device=device).double(), None, None, backend="cuda")


def test_tensors_must_be_on_a_gpu():
    with pytest.raises(BackendUnavailable, match="run on NVIDIA GPUs and the tensors are on cpu"):
        ops.momentum_scan(torch.ones(1, 2, 1), None, None, backend="cuda")
