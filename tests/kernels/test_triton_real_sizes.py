"""The kernels at the sizes of audio hosts and of training; on a GPU. Interpreted, in miniature.

The goldens are computed where the kernels run: in float64 on the GPU, by the closed form.
"""

from __future__ import annotations

import pytest
import torch

from mal_kernels import MemoryState, ops
from mal_kernels._torch.aligned_residual_read import aligned_fwd
from mal_kernels._torch.memory_read import read_fwd
from mal_kernels._torch.momentum_scan import scan_fwd
from mal_kernels.call import AlignedCall, ReadCall, ScanCall
from mal_kernels.testing import closed_form, make_inputs
from tests.support.parity import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    assert_same,
    moved,
    on_tensors,
    values,
    values_and_gradients,
)

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
if INTERPRETED:
    DTYPES = DTYPES[1:2]

# decay toward zero would leave nothing of a deep memory after a thousand tokens: hence init
TURN = dict(step="chunk", chunk_size=None, init=True, max_grad_norm=1.0)
SMALL = dict(heads=1, head_dim=8, hidden=12)


def size(real, miniature):
    return miniature if INTERPRETED else real


TRAINING = size(
    dict(heads=4, head_dim=64, hidden=256, chunk_size=64, init=True),
    dict(chunk_size=16, init=True, **SMALL),
)
LAYERS = {
    "turns of a batch": size(
        dict(TURN, lengths=[112, 28, 0, 375, 100], heads=4, head_dim=64, hidden=128),
        dict(TURN, lengths=[5, 0, 3], **SMALL),
    ),
    "32 dialogues": size(
        dict(TURN, lengths=[28 + 11 * i for i in range(32)], heads=4, head_dim=64, hidden=128),
        dict(TURN, lengths=[2, 2], **SMALL),
    ),
    "a turn of 1500": size(
        dict(TURN, lengths=[1500], heads=4, head_dim=128, hidden=256, residual_norm=True),
        dict(TURN, lengths=[20], residual_norm=True, **SMALL),
    ),
    "training": dict(TRAINING, **size(dict(batch=2, tokens=2048), dict(batch=1, tokens=20))),
    "wide": size(
        dict(batch=1, tokens=512, heads=2, head_dim=128, hidden=512, chunk_size=64, init=True),
        dict(batch=1, tokens=3, chunk_size=2, heads=1, head_dim=20, hidden=36, init=True),
    ),
    "linear": size(
        dict(batch=1, tokens=1024, heads=2, head_dim=256, depth=1, chunk_size=128),
        dict(batch=1, tokens=6, heads=1, depth=1, chunk_size=4),
    ),
}


def layer(case, dtype):
    """The op, its closed form in plain PyTorch, and their tensors."""
    inputs = moved(make_inputs(dtype=dtype, **case), DEVICE)
    triton = on_tensors(ops.neural_memory, inputs, backend="triton")
    return triton, on_tensors(closed_form, inputs), inputs.tensors()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_neural_memory(case, dtype):
    assert_same(*layer(LAYERS[case], dtype), dtype)


def turns(dtype):
    """Dialogues of unequal turns: hidden states of a host, where audio is, memories, parameters."""
    width, heads, dim, hidden, lengths = size(
        (4096, 4, 64, 128, [112, 28, 375, 100] * 8), (40, 1, 8, 12, [5, 1, 20])
    )
    g = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    rows, tokens, inner = len(lengths), sum(lengths), heads * dim
    shapes = [(width,), (inner, width), (inner, width), (width, inner)]
    state_index = torch.arange(rows).repeat_interleave(torch.tensor(lengths))
    floats = [
        normal(1, 2 * tokens, width).to(dtype),
        normal(rows, heads, dim, hidden) / dim**0.5,
        normal(rows, heads, hidden, dim) / hidden**0.5,
        *(normal(*s) / s[-1] ** 0.5 for s in shapes),
    ]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    places = (2 * torch.arange(tokens), state_index, cu_seqlens)
    return moved(floats, DEVICE), moved(places, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_residual_read(dtype):
    tensors, (token_index, state_index, _) = turns(dtype)

    def triton(hidden, w1, w2, *params):
        state = MemoryState((w1, w2), (w1, w2))
        places = (token_index, state_index, state, ops.ReadParams(*params))
        return ops.aligned_residual_read(hidden, *places, backend="triton")

    def portable(hidden, w1, w2, *params):
        places = (token_index, state_index, [w1, w2], list(params))
        return aligned_fwd(AlignedCall(hidden, *places, "gelu", False))

    assert_same(triton, portable, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_read(dtype):
    (_, w1, w2, *_), (_, state_index, cu_seqlens) = turns(dtype)
    q = torch.randn(1, len(state_index), w1.shape[1], w1.shape[2], device=DEVICE).to(dtype)

    def triton(q, *weights):
        state = MemoryState.from_weights(weights)
        return ops.memory_read(q, state, cu_seqlens=cu_seqlens, backend="triton")

    def portable(q, *weights):
        return read_fwd(ReadCall(q, list(weights), cu_seqlens, "gelu", False))

    assert_same(triton, portable, [q, w1, w2], dtype)


@pytest.mark.parametrize(
    "shape", size([(1, 100_000, 4, 64), (4, 4096, 4, 32, 64)], [(1, 40, 1, 3)])
)
def test_momentum_scan(shape):
    update, gates = torch.randn(*shape), torch.rand(2, *shape[:3])
    tensors = moved([update, *gates], DEVICE)

    def triton(*tensors):
        return ops.momentum_scan(*tensors, backend="triton")

    def portable(*tensors):
        return scan_fwd(ScanCall(*tensors, [], None))

    assert_same(triton, portable, tensors, torch.float32)


def test_a_hundred_thousand_tokens_do_not_drift():
    case = dict(TRAINING, batch=1, tokens=size(100_000, 40))
    with torch.no_grad():
        assert_same(*layer(case, torch.float32), torch.float32, values)


@pytest.mark.skipif(INTERPRETED, reason="one thread; in miniature elsewhere")
@pytest.mark.parametrize("case", ["turns of a batch", "training"])
def test_same_bits_twice(case):
    function, _, tensors = layer(LAYERS[case], torch.bfloat16)
    first, second = (values_and_gradients(function, tensors) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.skipif(INTERPRETED, reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("case", ["turns of a batch", "training", "one token"])
def test_neural_memory_in_a_cuda_graph(case):
    one = dict(batch=3, tokens=1, heads=4, head_dim=64, hidden=128, chunk_size=8, position=True)
    function, _, tensors = layer(LAYERS.get(case, one), torch.bfloat16)
    tensors = [t.detach().requires_grad_() for t in tensors]

    def both():
        out = function(*tensors)
        return [*out, *torch.autograd.grad(sum(x.sum() for x in out), tensors)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = both()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
