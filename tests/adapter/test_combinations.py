"""What users combine with the adapter: quantised and offloaded layers, and ways of decoding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mal_kernels import MALAdapter, MALConfig
from mal_kernels.testing import cache_name, tiny_host, tiny_inputs

SITES = ("embeds", 1)


@pytest.fixture
def host():
    return tiny_host("qwen2_audio").requires_grad_(False)


def attached(host, site="embeds", *, trained=True) -> MALAdapter:
    torch.manual_seed(1)
    mal = MALAdapter(MALConfig(heads=2, head_dim=8, site=site)).attach(host)
    if trained:
        torch.nn.init.normal_(mal.memory.to_out.weight, std=0.5)
    return mal


@torch.no_grad()
def logits(host, inputs):
    return host(**inputs).logits


def state_of(mal: MALAdapter, dialogue: str):
    return mal.dialogues.latest(dialogue).states[None].tensors()


def turns_of(host, mal: MALAdapter):
    """Logits of two turns of two dialogues, and what is remembered of one of them."""
    with mal.dialogue(["a", "b"]) as dialogue:
        dialogue.reset()
        answers = [logits(host, tiny_inputs(host, [[5], [3]], seed=seed)) for seed in range(2)]
    return answers, state_of(mal, "a")


# --- layers that are not plain linear layers on one device --------------------------------------


class Int8Linear(nn.Linear):
    """Weights as 8-bit integers and a scale per output, as quantisation libraries keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(host) -> int:
    replaced = 0
    for module in list(host.model.language_model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child.requires_grad_(False)))
                replaced += 1
    return replaced


@pytest.mark.parametrize("site", SITES)
def test_frozen_8_bit_layers(host, site):
    exact = logits(host, tiny_inputs(host, [[5], [3]]))
    assert quantise(host) == 3 * 7
    x, y = (tiny_inputs(host, [[5], [3]], seed=seed) for seed in range(2))
    clean = logits(host, x)
    assert not torch.equal(clean, exact)
    mal = attached(host, site, trained=False)
    assert torch.equal(logits(host, x), clean)
    torch.nn.init.normal_(mal.memory.to_out.weight, std=0.5)
    assert all(p.dtype == torch.float32 for p in mal.parameters())
    with mal.dialogue(["a", "b"]) as dialogue:
        host(**x)
        host(**y, labels=y["input_ids"]).loss.backward()
    assert dialogue.turns == [2, 2]
    assert all(p.grad.any() for p in mal.parameters())  # also through the write of the first turn
    mal.detach()
    assert torch.equal(logits(host, x), clean)
    assert host.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def dispatch(host, folder):
    """Two layers and the head on the disk, the rest in memory, hooks of accelerate on all."""
    accelerate = pytest.importorskip("accelerate")
    places = dict.fromkeys(("model.audio_tower", "model.multi_modal_projector"), "cpu")
    inner = "model.language_model."
    places |= {f"{inner}embed_tokens": "cpu", f"{inner}norm": "cpu", f"{inner}rotary_emb": "cpu"}
    places |= {f"{inner}layers.{i}": place for i, place in enumerate(("disk", "disk", "cpu"))}
    accelerate.dispatch_model(
        host, {**places, "lm_head": "disk"}, "cpu", offload_dir=folder, force_hooks=True
    )
    assert next(host.model.language_model.layers[1].parameters()).is_meta


@pytest.mark.filterwarnings("ignore:Converting a tensor:UserWarning")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("order", ["attached first", "dispatched first"])
def test_layers_offloaded_to_the_disk(host, site, order, tmp_path):
    x = tiny_inputs(host, [[5], [3]])
    clean, said = logits(host, x), host.generate(**x, max_new_tokens=3)
    mal = attached(host, site)
    expected, remembered = turns_of(host, mal)
    if order == "attached first":
        dispatch(host, tmp_path)
    else:
        mal.detach()
        dispatch(host, tmp_path)
        mal.attach(host)
    assert not any(p.is_meta for p in mal.parameters())
    answers, state = turns_of(host, mal)
    for a, b in zip([*answers, *state], [*expected, *remembered], strict=True):
        assert torch.equal(a, b)
    with mal.disable_adapter():
        assert torch.equal(logits(host, x), clean)
        assert torch.equal(host.generate(**x, max_new_tokens=3), said)
    mal.detach()
    assert torch.equal(logits(host, x), clean)


@pytest.mark.parametrize("order", ["attached first", "dispatched first"])
def test_a_projector_offloaded_to_the_disk(order, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    host = tiny_host("ultravox").requires_grad_(False)
    x = tiny_inputs(host, [[5], [3]])
    clean = logits(host, x)
    mal = attached(host)
    expected = logits(host, x)

    def dispatch() -> None:
        places = {"language_model": "cpu", "audio_tower": "cpu", "multi_modal_projector": "disk"}
        accelerate.dispatch_model(host, places, "cpu", offload_dir=tmp_path, force_hooks=True)

    if order == "attached first":
        dispatch()
    else:
        mal.detach()
        dispatch()
        mal.attach(host)
    assert next(host.multi_modal_projector.parameters()).is_meta
    assert torch.equal(logits(host, x), expected)
    mal.detach()
    assert torch.equal(logits(host, x), clean)


# --- ways of decoding -----------------------------------------------------------------------------

DECODINGS = {
    "assistant": lambda: {"assistant_model": tiny_host("qwen2_audio", seed=1)},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 2},
    "static cache": lambda: {"cache_implementation": "static", "disable_compile": True},
    "no cache": lambda: {"use_cache": False},
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("how", DECODINGS)
def test_every_way_of_greedy_decoding_says_and_writes_the_same(host, site, how):
    options = DECODINGS[how]()
    mal = attached(host, site)
    turns = [tiny_inputs(host, [[5]], seed=seed) for seed in range(2)]
    # without a cache the host takes an audio token that it says for one that it hears
    common = {"max_new_tokens": 6, "suppress_tokens": [host.config.audio_token_id]}
    common["eos_token_id"] = 63  # prompt lookup of transformers 5.10 needs one
    said = {}
    for name, extra in (("greedy", {}), ("other", options)):
        with mal.dialogue(name) as dialogue:
            said[name] = [host.generate(**x, **common, **extra) for x in turns]
        assert dialogue.turns == [2]
        assert mal.last_turn.tokens == [5]
    with mal.disable_adapter():
        plain = [host.generate(**x, **common) for x in turns]
    for a, b in zip(said["greedy"], said["other"], strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(said["greedy"], plain, strict=True))
    for a, b in zip(state_of(mal, "greedy"), state_of(mal, "other"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_dialogue_continues_on_the_cache_of_its_last_answer(host):
    mal = attached(host)
    both = tiny_inputs(host, [[5, 3]])
    cut = int((both["input_ids"][0] == host.config.audio_token_id).nonzero()[5]) - 1
    first = {k: v[:, :cut] for k, v in both.items() if v.dtype == torch.long and v.dim() == 2}
    first |= {k: both[k][:1] for k in ("input_features", "feature_attention_mask")}
    with mal.dialogue("a") as dialogue:
        out = host.generate(**first, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, both["input_ids"][:, cut:]], 1)
        second = {k: both[k][1:] for k in ("input_features", "feature_attention_mask")}
        second |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second[cache_name(host)] = getattr(out, cache_name(host))
        answer = host.generate(**second, max_new_tokens=2)
    assert answer.shape[1] == ids.shape[1] + 2
    assert dialogue.turns == [2]
    assert mal.last_turn.tokens == [3]


@pytest.mark.parametrize("name", ["qwen2_audio", "ultravox"])
@pytest.mark.parametrize("site", SITES)
def test_a_decode_step_leaves_compiled_code_alone(name, site, monkeypatch):
    host = tiny_host(name).requires_grad_(False)
    mal, x = attached(host, site), tiny_inputs(host, [[5]])
    calls = []
    hooks = mal._attachment.hooks
    eagerly = hooks._eagerly
    monkeypatch.setattr(hooks, "_eagerly", lambda *args: calls.append(1) or eagerly(*args))
    counts = []
    for tokens in (1, 5):
        calls.clear()
        host.generate(**x, max_new_tokens=tokens)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
