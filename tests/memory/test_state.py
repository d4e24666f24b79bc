"""MemoryState: a value with rows."""

from __future__ import annotations

import torch

from mal_kernels import MemoryState
from mal_kernels.testing import make_inputs


def test_rows_can_be_taken_and_put_together_again():
    state = make_inputs(batch=3, position=True).state
    rows = [state.index_select(torch.tensor([i])) for i in range(3)]
    again = MemoryState.cat(rows)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), state.tensors(), strict=True))
    repeated = state.index_select(torch.tensor([2, 0, 2]))
    assert torch.equal(repeated.weights[0][2], state.weights[0][2])
    assert repeated.position.tolist() == [6, 0, 6]


def test_cat_of_open_and_closed_chunks():
    state = make_inputs(batch=2, position=True).state
    both = MemoryState.cat([state, state.end_chunk()])
    assert both.position.tolist() == [0, 3, 0, 0]
    assert MemoryState.cat([state.end_chunk()] * 2).position is None


def test_end_chunk_forgets_the_place_only():
    state = make_inputs(position=True).state
    closed = state.end_chunk()
    assert closed.anchor is None
    assert closed.position is None
    assert closed.weights is state.weights


def test_finite_by_row():
    state = make_inputs(batch=3).state
    state.weights[0][1, 0, 0, 0] = float("inf")
    state.momentum[1][2, 0, 0, 0] = float("nan")
    assert state.is_finite().tolist() == [True, False, False]


def test_norm_by_row_and_head():
    state = make_inputs(batch=3, residual_norm=True).state
    every = [t.double() for t in (*state.weights, *state.momentum)]
    for row in range(3):
        for head in range(2):
            flat = torch.cat([t[row, head].flatten() for t in every])
            torch.testing.assert_close(state.norm()[row, head], flat.norm())
    large = state.map(lambda t: t.float() * 1e38)  # whose squares are no float32
    assert large.norm().isfinite().all()
    state.weights[0][1, 0, 0, 0] = float("inf")
    state.momentum[1][2, 0, 0, 0] = float("nan")
    assert state.norm().isfinite().tolist() == [[True, True], [False, True], [False, True]]


def test_detach_cuts_the_graph():
    inputs = make_inputs(position=True).map(lambda t: t.requires_grad_())
    assert inputs.state.weights[0].requires_grad
    detached = inputs.state.detach()
    assert not any(t.requires_grad for t in detached.tensors())
    assert torch.equal(detached.weights[0], inputs.state.weights[0])


def test_nbytes_counts_every_tensor():
    state = make_inputs(batch=1, heads=1, head_dim=2, hidden=3, dtype=torch.float32).state
    assert state.nbytes == 2 * (2 * 3 + 3 * 2) * 4
