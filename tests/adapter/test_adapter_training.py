"""Gradients reach the adapter alone, and through earlier turns."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext

import pytest
import torch

from mal_kernels import MALAdapter
from mal_kernels.testing import tiny_host, tiny_inputs
from tests.support.adapters import SITES, assert_same_states, attached, checkpoint, states_of


def digest(host) -> str:
    state = host.state_dict()
    return hashlib.sha256(b"".join(state[k].numpy().tobytes() for k in sorted(state))).hexdigest()


def gradients(mal: MALAdapter) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in mal.named_parameters() if p.grad is not None}
    mal.zero_grad()
    return found


@pytest.mark.parametrize("site", ["embeds", pytest.param(1, marks=pytest.mark.slow)])
def test_training_through_the_turns_leaves_the_host_alone(host, site):
    before = digest(host)
    mal = attached(host, site, trained=False)
    optimizer = torch.optim.Adam(mal.parameters(), lr=1e-2)
    turns = [tiny_inputs(host, [[5], [3]], seed=i) for i in range(3)]
    losses = []
    for _ in range(8):
        with mal.dialogue(["a", "b"]) as dialogue:
            dialogue.reset()
            loss = sum(host(**x, labels=x["input_ids"]).loss for x in turns)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert digest(host) == before
    assert all(p.grad is None for p in host.parameters())


@pytest.mark.parametrize("site", SITES)
def test_a_loss_reaches_the_writes_of_earlier_turns(host, site):
    mal = attached(host, site)
    turns = [tiny_inputs(host, [[5], [3]], seed=i) for i in range(2)]

    def last_loss(*, detach: bool) -> dict[str, torch.Tensor]:
        with mal.dialogue(["a", "b"], "A") as dialogue:
            dialogue.reset()
            host(**turns[0])
            if detach:
                dialogue.detach()
            host(**turns[1], labels=turns[1]["input_ids"]).loss.backward()
        return gradients(mal)

    full, cut = last_loss(detach=False), last_loss(detach=True)
    writes = {"memory.to_k.weight", "memory.to_v.weight", "memory.to_rates.weight"}
    reads = {"memory.to_q.weight", "memory.to_gate.weight", "memory.to_out.weight"}
    assert all(full[name].any() for name in writes | reads | {"memory.init.0", "memory.init.1"})
    assert not any(name in cut and cut[name].any() for name in writes)
    assert all(cut[name].any() for name in reads)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(host, site, use_reentrant, monkeypatch):
    mal = attached(host, site)
    turns = [tiny_inputs(host, [[5, 2], [3]], seed=i) for i in range(2)]
    calls = []
    write = mal.memory.write
    monkeypatch.setattr(mal.memory, "write", lambda *a: calls.append(1) or write(*a))

    def train() -> tuple[dict[str, torch.Tensor], dict, int]:
        calls.clear()
        with mal.dialogue(["a", "b"]) as dialogue:
            dialogue.reset()
            loss = sum(host(**x, labels=x["input_ids"], use_cache=False).loss for x in turns)
            loss.backward()
        return gradients(mal), states_of(mal), len(calls)

    plain = train()
    host.train()
    checkpoint(host, use_reentrant=use_reentrant)
    checkpointed = train()
    assert host.model.language_model.layers[0].gradient_checkpointing
    if site != "embeds":  # hooks of a checkpointed layer run twice before transformers 5.23
        assert not host.model.language_model.layers[site].gradient_checkpointing
    assert plain[2] == checkpointed[2] == 4  # the first of two clips and the last ones, twice
    for name, gradient in plain[0].items():
        torch.testing.assert_close(checkpointed[0][name], gradient, rtol=1e-4, atol=1e-6)
    assert_same_states(checkpointed[1], plain[1], rtol=1e-5, atol=1e-6)
    mal.detach()
    assert host.model.language_model.layers[1].gradient_checkpointing


@pytest.mark.parametrize("site", SITES)
def test_bf16_host_and_autocast_keep_the_memory_in_float32(site):
    exact = tiny_host("qwen2_audio")
    x = tiny_inputs(exact, [[5], [3]])
    for host, context in (
        (tiny_host("qwen2_audio").bfloat16(), nullcontext()),
        (exact, torch.autocast("cpu", torch.bfloat16)),
    ):
        mal = attached(host, site)
        assert all(p.dtype == torch.float32 for p in mal.parameters())
        with mal.dialogue(["a", "b"]) as dialogue, context:
            out = host(**x, output_hidden_states=True)
            host.generate(**tiny_inputs(host, [[2], [4]], seed=1), max_new_tokens=2)
        assert out.hidden_states[0].dtype == host.dtype
        assert all(t.dtype == torch.float32 for t in dialogue.state.tensors())
        assert dialogue.turns == [2, 2]
