"""The ops against implementations nobody here wrote: titans-pytorch and flash-linear-attention."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mal_kernels.ops import memory_read, memory_update, neural_memory
from mal_kernels.state import MemoryState
from mal_kernels.testing.oracles import TitansPytorch, fla_momentum_delta_rule

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
B, H, D, E = 2, 3, 8, 16
HEADS = {"heads": H, "head_dim": D, "hidden_dim": E}


def make_leaves(tokens, gates, *, depth=2, residual_norm=False, dtype=torch.float64, device="cpu"):
    """q, k, v, lr, momentum, decay, weights and momenta: leaves that want gradients.

    The stable regime: unit keys, lr of a hundredth. From lr of about 1 the recurrence is chaotic
    and two correct programs differ in every digit.
    """
    generator = torch.Generator().manual_seed(tokens)
    options = {"generator": generator, "dtype": torch.float64}
    normal, uniform = partial(torch.randn, **options), partial(torch.rand, **options)
    q, k, v = normal(3, B, tokens, H, D)
    lr, momentum, decay = uniform(B, tokens, H), uniform(B, gates, H), uniform(B, gates, H)
    widths = [D, *[E] * (depth - 1), D]
    weights = [normal(B, H, i, o) * i**-0.5 for i, o in pairwise(widths)]
    if residual_norm:
        weights.append(0.1 * normal(B, H, D))
    momenta = [0.01 * normal(*w.shape) for w in weights]
    unit = torch.nn.functional.normalize
    tensors = [unit(q, dim=-1), unit(k, dim=-1), v, 0.01 * lr, momentum, 0.1 * decay]
    return [x.to(device, dtype).requires_grad_() for x in (*tensors, *weights, *momenta)]


def as_arguments(leaves):
    layers = (len(leaves) - 6) // 2
    return (*leaves[:6], MemoryState(tuple(leaves[6 : 6 + layers]), tuple(leaves[6 + layers :])))


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss that weighs every output element, the final state's too, differently."""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)).sum()
        for x in outputs
    )
    return torch.autograd.grad(loss, leaves)


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape
        error, scale = (a - b).abs().max().item(), b.abs().max().item()
        assert error <= tolerance * scale, f"tensor {index}: {error:.1e} of {scale:.1e}"


def compare(our_outputs, their_outputs, leaves, *, forward, backward):
    assert_same(our_outputs, their_outputs, forward)
    ours, theirs = gradients(our_outputs, leaves), gradients(their_outputs, leaves)
    assert_same(ours, theirs, backward)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual_norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "chunk", "depth"),
    [(48, 16, 2), (48, 1, 2), (37, 16, 2), (64, 64, 2), (24, 8, 1), (24, 8, 3)],
)
def test_token_steps_equal_titans_pytorch(tokens, chunk, depth, residual_norm, device):
    leaves = make_leaves(tokens, tokens, depth=depth, residual_norm=residual_norm, device=device)
    peer = TitansPytorch(**HEADS, depth=depth, chunk_size=chunk, residual_norm=residual_norm).to(
        device
    )
    output, state = peer(*as_arguments(leaves))
    ours = neural_memory(*as_arguments(leaves), chunk_size=chunk, residual_norm=residual_norm)
    compare(
        [ours.output, *ours.state.weights, *ours.state.momentum],
        [output, *state.weights, *state.momentum],
        leaves,
        forward=1e-12,
        backward=1e-12,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual_norm", [False, True])
@pytest.mark.parametrize(("tokens", "chunk", "depth"), [(48, 16, 2), (32, 32, 2), (24, 8, 3)])
def test_chunk_steps_equal_titans_pytorch(tokens, chunk, depth, residual_norm, device):
    leaves = make_leaves(
        tokens, tokens // chunk, depth=depth, residual_norm=residual_norm, device=device
    )
    peer = TitansPytorch(
        **HEADS, depth=depth, chunk_size=chunk, step="chunk", residual_norm=residual_norm
    ).to(device)
    output, state = peer(*as_arguments(leaves))
    ours = neural_memory(
        *as_arguments(leaves), chunk_size=chunk, step="chunk", residual_norm=residual_norm
    )
    # there, a chunk's last token reads what its own chunk has written
    shared = torch.arange(1, tokens + 1) % chunk != 0
    compare(
        [ours.output[:, shared], *ours.state.weights, *ours.state.momentum],
        [output[:, shared], *state.weights, *state.momentum],
        leaves,
        forward=1e-12,
        backward=1e-12,
    )


def test_write_then_read_equals_titans_pytorch():
    leaves = make_leaves(48, 48)
    q, k, v, lr, momentum, decay, state = as_arguments(leaves)
    written = memory_update(k, v, lr, momentum, decay, state, chunk_size=16).state
    peer = TitansPytorch(**HEADS, chunk_size=16)
    _, theirs = peer(q, k, v, lr, momentum, decay, state)
    # gates of zero and no momentum: every token there reads the same weights
    still = torch.zeros_like(lr)
    output, _ = peer(q, k, v, still, still, still, MemoryState.from_weights(theirs.weights))
    compare(
        [memory_read(q, written), *written.weights, *written.momentum],
        [output, *theirs.weights, *theirs.momentum],
        leaves,
        forward=1e-12,
        backward=1e-12,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_float32_stays_close_to_titans_pytorch(device):
    leaves = make_leaves(64, 64, dtype=torch.float32, device=device)
    output, state = TitansPytorch(**HEADS, chunk_size=16).to(device)(*as_arguments(leaves))
    ours = neural_memory(*as_arguments(leaves), chunk_size=16)
    compare(
        [ours.output, *ours.state.weights, *ours.state.momentum],
        [output, *state.weights, *state.momentum],
        leaves,
        forward=1e-5,
        backward=1e-4,
    )


@pytest.mark.filterwarnings("ignore")  # at its import flash-linear-attention reports what it lacks
@pytest.mark.parametrize("device", DEVICES)
def test_linear_memory_equals_flash_linear_attention(device):
    leaves = make_leaves(40, 40, depth=1, dtype=torch.float32, device=device)
    output, state = fla_momentum_delta_rule(*as_arguments(leaves))
    ours = neural_memory(*as_arguments(leaves), chunk_size=1)
    compare(
        [ours.output, *ours.state.weights, *ours.state.momentum],
        [output, *state.weights, *state.momentum],
        leaves,
        forward=1e-5,
        backward=1e-4,
    )
