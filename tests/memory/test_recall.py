"""One turn of a dialogue: what it reads, what it writes, and what it leaves out."""

from __future__ import annotations

import math

import pytest
import torch

from mal_kernels import NeuralMemory
from mal_kernels.memory import Clips, recall, write_rows


@pytest.fixture(params=[1, 2])
def memory(request) -> NeuralMemory:
    torch.manual_seed(0)
    options = dict(heads=2, head_dim=8, depth=request.param, step="chunk", chunk_size=None)
    return NeuralMemory(12, **options)


def clips_of(lengths, rows, start=0) -> Clips:
    lengths, rows = (torch.tensor(x, dtype=torch.int64) for x in (lengths, rows))
    return Clips.of(start + lengths.cumsum(0) - lengths, lengths, rows)


def test_clips_name_their_tokens():
    clips = Clips.of(torch.tensor([7, 1]), torch.tensor([2, 3]), torch.tensor([0, 4]))
    assert clips.places.tolist() == [7, 8, 1, 2, 3]
    assert clips.cu_seqlens.tolist() == [0, 2, 5]
    hidden = torch.randn(2, 5, 3)
    assert torch.equal(clips.tokens(hidden)[0], hidden[1, 2])


def test_turn_after_turn_is_the_causal_layer(memory):
    x = torch.randn(3, 4 * 5, 12)
    memory.chunk_size = 5
    expected = x + memory(x)[0]
    memory.chunk_size = None
    state, changed = memory.initial_state(3), []
    for turn in x.split(5, 1):
        hidden, (state, *_) = recall(memory, turn, clips_of([5, 5, 5], [0, 1, 2]), state)
        changed.append(hidden)
    torch.testing.assert_close(torch.cat(changed, 1), expected, rtol=1e-5, atol=1e-5)


def test_each_speaker_has_a_memory_of_their_own(memory):
    state, hidden = memory.initial_state(4), torch.randn(1, 6, 12)
    _, (after, surprise, kept) = recall(memory, hidden, clips_of([6], [2]), state)
    assert surprise.shape == (6, 2)
    assert kept.tolist() == [True]
    for before, now in zip(state.tensors(), after.tensors(), strict=True):
        changed = [not torch.equal(a, b) for a, b in zip(before, now, strict=True)]
        assert changed == [False, False, True, False]


def test_what_is_written_can_differ_from_what_reads(memory):
    hidden = torch.randn(1, 6, 12)
    both, last = clips_of([2, 4], [0, 0]), clips_of([4], [1], start=2)
    ends, rows = torch.tensor([0, 4]), torch.tensor([1])
    first = torch.randn(4, 12)
    past = write_rows(memory, first, ends, torch.tensor([0]), memory.initial_state(2)).state
    changed, (state, *_) = recall(memory, hidden, both, past, to_write=last)
    expected = write_rows(memory, hidden[0, 2:], ends, rows, past).state
    for a, b in zip(state.tensors(), expected.tensors(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(changed, hidden)
    nothing = clips_of([], [])
    same = recall(memory, hidden, both, state, to_write=nothing)[1]
    assert same.state is state
    assert same.kept.tolist() == []


@pytest.mark.parametrize("bound", ["not finite", "explodes"])
def test_what_cannot_be_written_harms_no_other_row(memory, bound):
    tokens, state = torch.randn(9, 12), memory.initial_state(3)
    ends, rows = torch.tensor([0, 3, 5, 9]), torch.tensor([0, 1, 2])
    most = math.inf
    if bound == "not finite":
        tokens[4, 0] = math.nan
    else:  # only the second memory is near the bound
        grown = [torch.cat([w[:1], 50 + w[1:2], w[2:]]) for w in state.weights]
        state = state._replace(weights=tuple(grown))
        most = 50.0
    parameters = list(memory.parameters())
    done = write_rows(memory, tokens, ends, rows, state, max_norm=most)
    assert done.kept.tolist() == [True, False, True]
    keep = torch.tensor([0, 1, 2, 5, 6, 7, 8])
    alone = write_rows(memory, tokens[keep], torch.tensor([0, 3, 7]), rows[[0, 2]], state)
    torch.testing.assert_close(done.surprise, alone.surprise)
    grads = []
    for written in (done.state, alone.state):
        loss = sum(t.square().sum() for t in written.tensors())
        grads.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.isfinite().all()
            torch.testing.assert_close(a, b)
    for a, b in zip(done.state.tensors(), alone.state.tensors(), strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a[1], b[1])
