"""The CUDA kernels within the budgets of the reference: emulated on the host, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from emulation import in_process, library, needs_compiler, serve

from mal_kernels import BackendUnavailable, MemoryState, ops, reference
from mal_kernels.testing import assert_within_budget, low_precision, make_inputs


def every_case_and_dtype(cases, dtypes, few):
    """All cases in the first dtype, and the `few` in the others."""
    return [(case, dtypes[0]) for case in cases] + [(c, d) for d in dtypes[1:] for c in few]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return library(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernels run; on the CPU they are emulated."""
    if request.param == "cpu":
        needs_compiler()
        serve(monkeypatch, in_process(request.getfixturevalue("emulated")))
    return torch.device(request.param)


def values_and_gradients(function, tensors):
    """Outputs of ``function`` and gradients of a fixed random loss, on the CPU."""
    tensors = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    out = function(**tensors)
    g = torch.Generator().manual_seed(1)
    noise = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in out]
    loss = sum((x * n.to(x)).sum() for x, n in zip(out, noise, strict=True))
    grads = torch.autograd.grad(loss, tensors.values())
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


# --- memory_update --------------------------------------------------------------------------------

WRITES = {
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
    "inside a chunk, norm": dict(chunk_size=100, position=True, residual_norm=True, batch=2),
    "linear": dict(depth=1, chunk_size=32),
    "linear, norm, clip": dict(
        depth=1, head_dim=40, chunk_size=32, residual_norm=True, max_grad_norm=0.5
    ),
    "128 features, four blocks": dict(
        tokens=70, heads=1, head_dim=128, hidden=100, chunk_size=64, activation="gelu_tanh"
    ),
    "linear, 128 features": dict(
        tokens=70, heads=1, head_dim=128, depth=1, chunk_size=64, step="chunk"
    ),
    "gates of 0 and 1": dict(chunk_size=16, edges=True),
    "no gates": dict(chunk_size=16, gates=False),
    "no tokens": dict(tokens=0, chunk_size=16),
}  # fmt: skip


def write_inputs(dtype=torch.bfloat16, **case):
    sizes = dict(tokens=40, batch=1, heads=2, head_dim=64, hidden=64)
    return make_inputs(**(sizes | case), dtype=dtype)


def written(function, inputs, device="cpu", **more):
    """What a write returns, by name, on the CPU; an anchor where it will be read."""
    _, *given, options = inputs
    moved = [None if x is None else x.to(device) for x in given[:5]]
    state = given[5].map(lambda x: x.to(device))
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor)
        else [w.to(device) for w in x] if name == "init" and x else x
        for name, x in options.items()
    }  # fmt: skip
    with torch.no_grad():
        out = function(*moved, state, **options, **more)
    named = {"surprise": out.surprise}
    for field in ("weights", "momentum", "anchor"):
        for i, w in enumerate(getattr(out.state, field) or ()):
            named[f"{field}[{i}]"] = w if field != "anchor" else w[out.state.position > 0]
    if out.state.position is not None:
        named["position"] = out.state.position.double()
    return {name: x.cpu() for name, x in named.items()}


def golden_write(k, *rest, **options):
    return reference.recurrence(k, k, *rest, **options)


def twin_write(*given, **options):
    return reference.neural_memory(None, *given, **options)


@pytest.mark.parametrize(
    ("case", "dtype"),
    every_case_and_dtype(
        WRITES,
        [torch.bfloat16, torch.float16],
        ["token steps", "norm, clip, odd sizes", "128 features, four blocks"],
    ),
)
def test_memory_update(case, dtype, device):
    inputs = write_inputs(dtype, **WRITES[case])
    actual = written(ops.memory_update, inputs, device, backend="cuda")
    golden = written(golden_write, inputs.to(torch.float64))
    with low_precision(dtype):
        twin = written(twin_write, inputs.to(torch.float32))
    assert actual.keys() == golden.keys()
    for name, x in actual.items():
        assert_within_budget(name, x, golden[name], twin=twin[name], dtype=dtype)


def test_a_write_of_several_calls_is_that_of_one(device):
    # the same tiles: the state goes through memory between them, and nothing is lost
    inputs = write_inputs(tokens=96, chunk_size=32, heads=1)
    whole = written(ops.memory_update, inputs, device, backend="cuda")
    _, *tokens, state, options = inputs
    with torch.no_grad():
        for part in (slice(0, 32), slice(32, 96)):
            given = [x[:, part].to(device) for x in tokens]
            state = state.map(lambda x: x.to(device))
            state = ops.memory_update(*given, state, **options, backend="cuda").state
    for i, w in enumerate(state.weights):
        assert torch.equal(w.cpu(), whole[f"weights[{i}]"])


def test_the_same_bits_twice(device):
    inputs = write_inputs(tokens=70, hidden=128, chunk_size=32, max_grad_norm=0.5)
    first, second = (written(ops.memory_update, inputs, device, backend="cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


UNSERVED = {
    "float32": (dict(dtype=torch.float32), "takes float16 and bfloat16 tokens, not torch.float32"),
    "features": (dict(head_dim=20), "not depth 2, 20 features, 64 units"),
    "width": (dict(head_dim=128, hidden=257), "up to 256 hidden units; not"),
    "depth": (dict(depth=3), "not depth 3"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_writes_that_the_kernel_cannot_serve_are_refused(case, device):
    sizes, message = UNSERVED[case]
    with pytest.raises(BackendUnavailable, match=message):
        written(ops.memory_update, write_inputs(**sizes), device, backend="cuda")


def test_a_write_that_wants_gradients_is_refused(device):
    _, *given, options = write_inputs()
    given[0].requires_grad_()
    with pytest.raises(BackendUnavailable, match="no backward yet"):
        ops.memory_update(
            *(x if x is None else x.to(device) for x in given[:5]),
            given[5].map(lambda x: x.to(device)),
            **options,
            backend="cuda",
        )


# --- what is refused everywhere -------------------------------------------------------------------


def test_what_the_kernels_cannot_serve_is_refused(device):
    with pytest.raises(BackendUnavailable, match="float64 is served by the reference"):
        ops.momentum_scan(torch.ones(1, 2, 1, device=device).double(), None, None, backend="cuda")


def test_tensors_must_be_on_a_gpu():
    with pytest.raises(BackendUnavailable, match="run on NVIDIA GPUs and the tensors are on cpu"):
        ops.momentum_scan(torch.ones(1, 2, 1), None, None, backend="cuda")
