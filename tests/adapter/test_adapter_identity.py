"""A host with a fresh, disabled or detached adapter is the host; only audio tokens change."""

from __future__ import annotations

import pytest
import torch

from mal_kernels import MALAdapter
from mal_kernels.errors import HostError
from mal_kernels.testing import tiny_host, tiny_inputs
from tests.support.adapters import (
    CONFIG,
    DECODING,
    SITES,
    assert_identical,
    attached,
    checkpoint,
    everything_on,
    generate,
)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("decoding", DECODING)
def test_untrained_and_disabled_adapters_change_no_bit(host, site, decoding):
    host.requires_grad_(False)  # freezing it is another computation
    options = DECODING[decoding]
    turns = [tiny_inputs(host, [[5], [3]], seed=i) for i in range(2)]
    before = [(generate(host, x, **options), host(**x).logits) for x in turns]

    untrained = attached(host, site, trained=False)
    with untrained.dialogue(["a", "b"]) as dialogue:
        for x, (ids, logits) in zip(turns, before, strict=True):
            assert_identical(generate(host, x, **options), ids)
            assert torch.equal(host(**x).logits, logits)
    assert dialogue.turns == [2, 2]
    untrained.detach()

    trained = attached(host, site)
    with trained.dialogue(["a", "b"]) as dialogue, trained.disable_adapter():
        for x, (ids, logits) in zip(turns, before, strict=True):
            assert_identical(generate(host, x, **options), ids)
            assert torch.equal(host(**x).logits, logits)
    assert dialogue.turns == [0, 0]
    assert trained.last_turn is None
    assert not torch.equal(host(**turns[0]).logits, before[0][1])  # and enabled it does matter


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_residual_changes_exactly_the_audio_positions(host, site, side):
    inputs = tiny_inputs(host, [[5, 2], [], [3]], side=side)
    audio = inputs["input_ids"] == host.config.audio_token_id
    host.requires_grad_(False)
    # hidden states are recorded by hooks that transformers sets up now, before ours
    before = host(**inputs, output_hidden_states=True)
    mal = attached(host, site)
    after = host(**inputs, output_hidden_states=True)
    at = 0 if site == "embeds" else site + 1
    for layer in range(at):
        assert torch.equal(before.hidden_states[layer], after.hidden_states[layer])
    changed = (before.hidden_states[at] != after.hidden_states[at]).any(-1)
    assert torch.equal(changed, audio)
    # causality: text before the first clip is as it was, text after the last is not
    heard = audio.cumsum(1) > 0
    same = (before.logits == after.logits).all(-1)
    assert same[~heard].all()
    assert not same[0, heard[0]].any()
    mal.detach()
    assert torch.equal(host(**inputs).logits, before.logits)


@pytest.mark.parametrize("site", SITES)
def test_detach_restores_the_host_exactly(host, site):
    inputs = tiny_inputs(host, [[4]])
    host(**inputs, output_hidden_states=True)
    next(host.parameters()).requires_grad_(False)  # one that was frozen before stays so
    checkpoint(host)
    before = everything_on(host)
    mal = attached(host, site)
    assert everything_on(host) != before
    assert not any(p.requires_grad for p in host.parameters())
    assert not any("mal" in name.lower() for name in host.state_dict())
    with mal.dialogue("a"):
        host.generate(**inputs, max_new_tokens=2)
        host(**inputs)
    mal.detach()
    assert everything_on(host) == before
    with pytest.raises(HostError, match="not attached"):
        mal.detach()
    assert mal.attach(host) is mal
    assert len(mal.dialogues) == 1


def test_detach_keeps_a_generate_that_was_the_users_own(host):
    def mine(*args, **kwargs):
        return "mine"

    host.generate = mine
    mal = attached(host)
    assert host.generate() == "mine"
    mal.detach()
    assert host.generate is mine


@pytest.mark.parametrize("name", ["qwen2_audio", "phi4_multimodal"])  # freezing moves a bit of it
def test_freeze_is_optional(name):
    host = tiny_host(name)
    inputs = tiny_inputs(host, [[5], [3]])
    before = host(**inputs).logits
    mal = MALAdapter(CONFIG).attach(host, freeze=False)
    assert host.lm_head.weight.requires_grad
    with mal.dialogue(["a", "b"]):
        assert torch.equal(host(**inputs).logits, before)
    mal.detach()
    assert host.lm_head.weight.requires_grad
