"""What is found inside a host: decoder, last useful layer, audio tokens, clips, fingerprints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mal_kernels import HostSpec, MALAdapter, MALConfig, hosts, register_host
from mal_kernels.errors import ArgumentError, HostError
from mal_kernels.hosts import Clip, Host, find_decoder, fingerprint, last_effective_layer
from mal_kernels.testing import tiny_host, tiny_inputs


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(hosts, "_SPECS", dict(hosts._SPECS))


def stack(n: int, **children: nn.Module) -> nn.Module:
    module = nn.Module()
    module.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(n))
    for name, child in children.items():
        module.add_module(name, child)
    return module


def decoder_of(n: int, **config) -> nn.Module:
    decoder = stack(n)
    decoder.config = SimpleNamespace(**config)
    return decoder


def test_decoder_is_the_longest_stack_outside_the_encoders():
    text = stack(3)
    model = nn.Module()
    model.audio_tower, model.vision_tower, model.talker = stack(9), stack(9), stack(9)
    model.model = nn.Module()
    model.model.encoder = stack(9)
    model.model.depth_decoder, model.model.language_model = stack(2), text
    assert find_decoder(model) is text


def test_no_decoder():
    with pytest.raises(HostError, match=r"no ModuleList named 'layers'.*register_host"):
        find_decoder(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("n", "config", "last"),
    [
        (6, {}, 4),
        (35, {"num_kv_shared_layers": 15}, 18),  # Gemma 3n E4B
        (42, {"num_kv_shared_layers": 18}, 22),  # Gemma 4 E4B
        (6, {"layers_block_type": ["mamba", "mlp", "attention", "moe", "mlp", "moe"]}, 1),
    ],
)
def test_last_effective_layer(n, config, last):
    assert last_effective_layer(decoder_of(n, **config)) == last


def test_the_last_layer_is_dead_and_the_one_before_is_not():
    host = tiny_host("qwen2_audio")
    inputs = tiny_inputs(host, [[4]])
    audio = inputs["input_ids"][0] == host.config.audio_token_id
    last = last_effective_layer(find_decoder(host))

    def text_logits(layer: int | None) -> torch.Tensor:
        def push(_module, _args, output):
            return output + audio[None, :, None]

        layers = find_decoder(host).layers
        handle = None if layer is None else layers[layer].register_forward_hook(push)
        logits = host(**inputs).logits[:, ~audio]
        if handle is not None:
            handle.remove()
        return logits

    clean = text_logits(None)
    assert torch.equal(text_logits(last + 1), clean)
    assert not torch.equal(text_logits(last), clean)


def test_unknown_host_names_the_known_ones():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="moon_audio")
    with pytest.raises(HostError, match=r"'moon_audio'.*qwen2_audio.*register_host"):
        MALAdapter(MALConfig()).attach(model)
    with pytest.raises(HostError, match="known hosts"):
        Host.of(nn.Linear(2, 2))
    with pytest.raises(HostError, match="str"):
        Host.of("Qwen/Qwen2-Audio-7B")  # type: ignore[arg-type]


def test_register_host_makes_a_host_known():
    host = tiny_host("qwen2_audio")
    host.config.model_type = "my_audio_llm"
    register_host(HostSpec("my_audio_llm", audio_token="audio_config.marker"))
    with pytest.raises(HostError, match=r"config.audio_config.marker.*None"):
        Host.of(host)
    host.config.audio_config.marker = 7
    assert Host.of(host).audio_token_id == 7
    with pytest.raises(ArgumentError, match="pass a HostSpec"):
        register_host("my_audio_llm")  # type: ignore[arg-type]


def test_site_beyond_the_text_is_refused():
    host = Host.of(tiny_host("qwen2_audio", num_hidden_layers=4))
    assert host.site("embeds") is host.decoder
    assert host.site(2) is host.decoder.layers[2]
    with pytest.raises(HostError, match=r"site=3.*site <= 2 or 'embeds'"):
        host.site(3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_clips_are_runs_of_audio_tokens(side):
    model = tiny_host("qwen2_audio")
    host = Host.of(model)
    inputs = tiny_inputs(model, [[4, 2], [], [1]], side=side)
    found = host.clips(inputs, fingerprints=True)
    assert [[c.stop - c.start for c in row] for row in found] == [[4, 2], [], [1]]
    for row, clips in enumerate(found):
        heard = torch.zeros_like(inputs["input_ids"][row], dtype=torch.bool)
        for clip in clips:
            heard[clip.start : clip.stop] = True
        assert torch.equal(heard, inputs["input_ids"][row] == model.config.audio_token_id)
    marks = [clip.fingerprint for row in found for clip in row]
    assert marks == fingerprint(inputs["input_features"])
    assert len(set(marks)) == 3


def test_clips_at_both_ends_and_side_by_side_with_text():
    host = Host.of(tiny_host("qwen2_audio"))
    a = host.audio_token_id
    inputs = {"input_ids": torch.tensor([[a, a, 5, a]]), "input_features": torch.zeros(1, 8, 40)}
    # two runs and one entry of features: which belongs to which is not known
    assert host.clips(inputs, fingerprints=True) == [[Clip(0, 2, None), Clip(3, 4, None)]]


def test_clips_of_one_token_are_a_prompt_that_was_not_expanded():
    model = tiny_host("qwen2_audio")
    inputs = tiny_inputs(model, [[1], [1, 1]])
    with pytest.raises(HostError, match=r"3 clips of one audio placeholder each"):
        Host.of(model).clips(inputs, fingerprints=False)
    register_host(HostSpec("qwen2_audio", min_clip_tokens=1))
    assert [len(row) for row in Host.of(model).clips(inputs, fingerprints=False)] == [1, 2]


def test_masked_clips_are_not_heard_also_with_a_cache():
    model = tiny_host("qwen2_audio")
    inputs = tiny_inputs(model, [[3], [2]])
    inputs["attention_mask"][0] = 0
    found = Host.of(model).clips(inputs, fingerprints=True)
    assert [len(row) for row in found] == [0, 1]
    assert found[1][0].fingerprint == fingerprint(inputs["input_features"])[1]
    past = torch.ones(2, 9, dtype=torch.long)
    inputs["attention_mask"] = torch.cat([past, inputs["attention_mask"]], 1)
    assert Host.of(model).clips(inputs, fingerprints=True) == found


def test_arguments_by_position_and_name():
    host = Host.of(tiny_host("qwen2_audio"))
    ids, features = torch.zeros(1, 2), torch.zeros(1)
    named = host.arguments((ids, features), {"use_cache": False})
    assert list(named) == ["input_ids", "input_features", "use_cache"]
    assert named["input_features"] is features
    assert host.carries_audio(named)
    assert not host.carries_audio({"input_ids": ids, "input_features": None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_fingerprint_sees_every_word_and_only_its_own_clip(dtype):
    x = (torch.randn(3, 8, 16) * 20).to(dtype)
    marks = fingerprint(x)
    assert fingerprint(x.flip(0)) == marks[::-1]
    assert fingerprint(x[1:2]) == marks[1:2]
    for place in ((0, 0, 0), (0, 7, 15), (0, 3, 9)):
        y = x.clone()
        y[place] += 1
        assert fingerprint(y)[0] != marks[0]
        assert fingerprint(y)[1:] == marks[1:]
    assert fingerprint(x.transpose(1, 2))[0] != marks[0]


def test_fingerprint_is_part_of_the_file_format():
    # saved dialogues hold these numbers: a change would write clips again that are known
    marks = fingerprint(torch.arange(6, dtype=torch.float32).view(2, 3))
    assert marks == [-2996025758654136320, -1114353331454607360]
