"""The one launch of a turn's read within the budgets of the reference: emulated, or on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.library import opcheck

from mal_kernels import BackendUnavailable, MemoryState, ops, reference
from mal_kernels._cuda import aligned_residual_read as launcher
from mal_kernels.testing import assert_within_budget, low_precision
from mal_kernels.testing.emulation import devices
from tests.support.cuda import cuda, read, turn

device = devices("aligned_residual_read.cu")

TURNS = {
    "gelu": dict(),
    "one token": dict(tokens=1, rows=1),
    "no tokens": dict(tokens=0),
    "two tiles of tokens, three parts": dict(tokens=70, width=200, splits=3),
    "more slabs than are alive": dict(width=520, heads=1, dim=8, hidden=5),
    "more parts than slabs": dict(tokens=3, splits=16),
    "two tiles of columns": dict(tokens=5, heads=3, dim=24),
    "norm, silu": dict(residual_norm=True, activation="silu", dim=40),
    "128 features, three slabs of units": dict(
        tokens=17, heads=1, dim=128, hidden=300, activation="gelu_tanh", residual_norm=True
    ),
    "linear": dict(depth=1, activation="relu"),
    "linear, norm, 128 features": dict(depth=1, heads=1, dim=128, residual_norm=True),
    "relu, every token its own dialogue": dict(activation="relu", rows=20, state="one each"),
    "unsorted states": dict(tokens=40, rows=3, state="unsorted"),
    "16-bit parameters": dict(params=(None,) * 4),
    "parameters of many types": dict(
        params=(torch.float64, None, torch.float32, torch.float16), width=136
    ),
}


def assert_right(actual, given):
    """Within the budget at the tokens read, and as it was elsewhere."""
    dtype, named = given["hidden"].dtype, given["token_index"]
    golden = read(reference.aligned_residual_read, given, dtype=torch.float64)
    with low_precision(dtype):
        twin = read(reference.aligned_residual_read, given, dtype=torch.float32)
    others = torch.ones(actual.shape[1], dtype=torch.bool).index_fill(0, named, False)
    assert torch.equal(actual[0, others], given["hidden"][0, others])
    x, golden, twin = (t[0, named] for t in (actual, golden, twin))
    assert_within_budget("hidden", x, golden, twin=twin, dtype=dtype)


FEW = ["gelu", "norm, silu", "two tiles of tokens, three parts", "16-bit parameters"]


@pytest.mark.parametrize(
    ("case", "dtype"), [(c, torch.bfloat16) for c in TURNS] + [(c, torch.float16) for c in FEW]
)
def test_aligned_residual_read(case, dtype, device):
    given = turn(dtype, **TURNS[case])
    before = given["hidden"].clone()
    out = cuda(given, device)
    assert out.dtype == dtype
    assert_right(out, given)
    assert torch.equal(given["hidden"], before)


def test_aligned_residual_read_in_place_and_twice(device):
    given = turn(rows=3, state="unsorted", splits=2)
    first, again = cuda(given, device), cuda(given, device)
    assert torch.equal(first, again)
    inside = given["hidden"].to(device)
    out = cuda(given | dict(hidden=inside), device, ops.aligned_residual_read_)
    assert torch.equal(inside.cpu(), first)
    assert torch.equal(out, first)


WRONG = {
    "a token at another state": lambda g: g["state_index"].__setitem__(0, 1),
    "no norm": lambda g: g["params"].__setitem__(0, torch.ones(72)),
    "the last 8 features of the host left out": lambda g: g["params"][1][:, 64:].zero_(),
    "one unit left out": lambda g: g["weights"][0][..., 23].zero_(),
    "another activation": lambda g: g["options"].update(activation="silu"),
    "the last gate left out": lambda g: g["params"][2][31].zero_(),
    "the wrong token": lambda g: g["token_index"].copy_(g["token_index"].flip(0)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_aligned_residual_read_is_seen(mistake, device):
    given = turn()
    wrong = copy.deepcopy(given)
    WRONG[mistake](wrong)
    out = cuda(wrong, device)
    with pytest.raises(AssertionError):
        assert_right(out, given)


def test_aligned_residual_read_of_what_is_not_finite(device):
    given = turn(tokens=6, rows=2)
    given["state_index"] = torch.tensor([0, 1, 0, 1, 0, 0])
    expected = cuda(given, device)[0, given["token_index"]]
    given["hidden"][0, given["token_index"][2]] = torch.nan
    given["weights"][0][1, 0, 0, 0] = torch.inf
    given["weights"][1][1] = torch.nan
    out = cuda(given, device)[0, given["token_index"]]
    assert out[[1, 2, 3]].isnan().any(1).all()
    assert torch.equal(out[[0, 4, 5]], expected[[0, 4, 5]])


def test_aligned_residual_read_of_unaligned_memory(device):
    given = turn()
    expected = cuda(given, device)

    def shifted(x):
        """The same numbers, the first of them 2 or 4 bytes behind a multiple of 16."""
        room = x.new_empty(x.numel() + 1, device=device)[1:].view(x.shape).copy_(x)
        assert room.data_ptr() % 16
        return room

    moved = given | dict(hidden=shifted(given["hidden"]), params=[*map(shifted, given["params"])])
    for function in (ops.aligned_residual_read, ops.aligned_residual_read_):
        assert torch.equal(cuda(moved, device, function), expected)
    assert torch.equal(moved["hidden"].cpu(), expected)


REFUSED = {
    "float32": (dict(dtype=torch.float32), "takes float16 and bfloat16 hidden states"),
    "a head": (dict(dim=20), "multiples of 8 features of the host and of a head; not 72 and 20"),
    "the host": (dict(width=60), "not 60 and 16"),
    "many features": (dict(dim=136), "up to 128 features a head, not 136"),
    "depth": (dict(depth=3), "depth 1 and 2, not 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_aligned_residual_read_that_is_not_served(case, device):
    sizes, message = REFUSED[case]
    given = turn(**sizes)
    before = given["hidden"].clone()
    for function in (ops.aligned_residual_read, ops.aligned_residual_read_):
        with pytest.raises(BackendUnavailable, match=message):
            cuda(given, device, function)
    assert torch.equal(given["hidden"], before)


def test_aligned_residual_read_that_wants_gradients(device):
    given = turn()
    given["params"][3].requires_grad_()
    with pytest.raises(BackendUnavailable, match="no backward yet"):
        cuda(given, device)
    with torch.no_grad():
        assert_right(cuda(given, device), given)


@pytest.mark.parametrize("op", ["aligned_residual_read", "aligned_residual_read_"])
def test_registration(op, device):
    given = turn(tokens=3, heads=1)
    index = (given["token_index"].to(device), given["state_index"].to(device))
    weights, params = ([x.to(device) for x in given[name]] for name in ("weights", "params"))
    arguments = (given["hidden"].to(device), *index, weights, params, "gelu", False, "cuda")
    opcheck(getattr(torch.ops.mal_kernels, op).default, arguments)


def test_tensors_must_be_on_a_gpu():
    with pytest.raises(BackendUnavailable, match="run on NVIDIA GPUs and the tensors are on cpu"):
        cuda(turn(), "cpu")


def test_the_parts_keep_the_gpu_busy():
    # never more than there are slabs or threads to sum them; all blocks at work in a usual turn
    for tokens in (1, 28, 112, 375, 12_000):
        for width in (64, 1024, 4096, 8192):
            tiles, slabs = -(-tokens // launcher.ROWS) * 8, width // launcher.DEPTH
            splits = launcher.parts(tiles, slabs, 132)
            assert 1 <= splits <= min(slabs, launcher.SPLITS)
            if width >= 4096 and tokens < 12_000:
                assert tiles * splits >= 0.7 * 132


# --- on a GPU alone -------------------------------------------------------------------------------

HOST = dict(width=4096, heads=4, dim=64, hidden=128)
REAL = {
    "one turn": dict(tokens=112, rows=1, **HOST),
    "a short turn, 16-bit parameters": dict(tokens=28, rows=1, params=(None,) * 4, **HOST),
    "32 dialogues": dict(tokens=32 * 100, rows=32, **HOST),
    "128 features, norm": dict(
        tokens=375, rows=4, width=8192, heads=2, dim=128, hidden=512, residual_norm=True
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL)
def test_aligned_residual_read_of_real_sizes(case):
    given = turn(**REAL[case])
    out = cuda(given, "cuda")
    assert_right(out, given)
    assert torch.equal(cuda(given, "cuda"), out)


@pytest.mark.gpu
def test_aligned_residual_read_in_a_graph():
    given = turn(tokens=112, rows=2, **HOST)
    expected = cuda(given, "cuda")
    moved = {n: [x.cuda() for x in given[n]] for n in ("weights", "params")}
    moved |= {n: given[n].cuda() for n in ("hidden", "token_index", "state_index")}
    given, original = given | moved, given["hidden"]
    state = MemoryState(tuple(given["weights"]), tuple(given["weights"]))
    arguments = [given[n] for n in ("hidden", "token_index", "state_index")]

    def call():
        params = ops.ReadParams(*given["params"])
        ops.aligned_residual_read_(*arguments, state, params, backend="cuda")

    call()  # builds the library, and warms the allocator
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        given["hidden"].copy_(original)
        graph.replay()
        assert torch.equal(given["hidden"].cpu(), expected)
