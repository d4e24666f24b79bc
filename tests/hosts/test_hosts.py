"""What is found inside a host: decoder, last useful layer, audio tokens, clips, fingerprints."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mal_kernels import HostSpec, MALAdapter, MALConfig, hosts, register_host
from mal_kernels.errors import ArgumentError, HostError
from mal_kernels.hosts import Clip, Host, find_decoder, fingerprint, last_effective_layer
from mal_kernels.testing import tiny_host, tiny_inputs
from mal_kernels.testing.hosts import ENCODERS, RECIPES, REPLICAS, STREAMING
from tools import hosts_table


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(hosts.spec, "SPECS", dict(hosts.spec.SPECS))


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
    assert Host.of(host).audio_tokens == (7,)
    with pytest.raises(ArgumentError, match="pass a HostSpec"):
        register_host("my_audio_llm")  # type: ignore[arg-type]


def test_the_last_registered_host_counts():
    model = tiny_host("audio_flamingo")
    model.config = SimpleNamespace(model_type="my_audio_llm")
    assert Host.of(model).spec.model_type == "audio_flamingo"
    spec = HostSpec(
        "my_audio_llm", audio_token=None, encoder="audio_transformer", width="audio_embed_dim"
    )
    register_host(spec)
    assert Host.of(model).spec is spec


def test_every_host_with_an_audio_token_has_a_tiny_host():
    specs = [(name, hosts.spec.SPECS[name]) for name in hosts.BUILT_IN]
    assert {name for name, spec in specs if spec.audio_token} == set(RECIPES)
    flamingos = {"audio_flamingo", "audio_flamingo_2"}
    assert {name for name, spec in specs if spec.encoder} == set(ENCODERS) | flamingos
    projectors = {name for name, spec in specs if spec.projector}
    assert projectors == set(REPLICAS) - flamingos
    assert {name for name, spec in specs if spec.streaming} == set(STREAMING)
    with pytest.raises(ArgumentError, match=r"'moon_audio'.*'voxtral'"):
        tiny_host("moon_audio")


def test_the_committed_table_is_of_the_registered_hosts_and_the_kept_results():
    audio = {name for name in hosts.BUILT_IN if hosts.spec.SPECS[name].audio_inputs}
    assert set(hosts_table.kinds()) == audio
    results = hosts_table.load()
    table = hosts_table.TABLE.read_text()
    assert hosts_table.render(results) in table
    rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert rows == audio
    unverified = {name for name in rows if not hosts_table.verified(results, name)}
    assert not unverified


def test_a_host_with_a_failed_test_is_not_verified():
    results = {
        "5.9.0": {"whisper": {"passed": 3}},
        "5.23.0": {"whisper": {"passed": 2, "failed": 1}, "csm": {"skipped": 3}},
        "5.17.0": {"whisper": {"passed": 2, "skipped": 1}},
    }
    assert hosts_table.verified(results, "whisper") == ["5.17.0", "5.9.0"]
    assert hosts_table.verified(results, "csm") == []


def test_a_part_of_the_model_hears():
    model = tiny_host("qwen3_omni_moe")
    host = Host.of(model)
    assert host.model is model.thinker
    assert host.whole is model
    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(model)
    inputs = tiny_inputs(model, [[4], [3]])
    with mal.dialogue(["a", "b"]) as dialogue:
        model.generate(**inputs, thinker_max_new_tokens=2, return_audio=False)
        model.thinker.generate(**tiny_inputs(model, [[4], [3]], seed=1))
    assert dialogue.turns == [2, 2]
    assert not any(p.requires_grad for p in model.parameters())
    mal.detach()
    register_host(HostSpec("qwen3_omni_moe", root="listener"))
    with pytest.raises(HostError, match=r"no 'listener'.*HostSpec\(root"):
        Host.of(model)


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
    assert marks == fingerprint(inputs["input_features"], inputs["feature_attention_mask"])
    assert len(set(marks)) == 3


def test_clips_at_both_ends_and_side_by_side_with_text():
    host = Host.of(tiny_host("qwen2_audio"))
    a = host.audio_tokens[0]
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
    marks = fingerprint(inputs["input_features"], inputs["feature_attention_mask"])
    assert found[1][0].fingerprint == marks[1]
    past = torch.ones(2, 9, dtype=torch.long)
    inputs["attention_mask"] = torch.cat([past, inputs["attention_mask"]], 1)
    assert Host.of(model).clips(inputs, fingerprints=True) == found


# --- text that attends to an encoder --------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_what_an_encoder_hears(name, options):
    model = tiny_host(name).requires_grad_(False)
    first, second = (tiny_inputs(model, [[5], [4]], seed=seed) for seed in range(2))
    clean = [(model(**x).logits, model.generate(**x, **options)) for x in (first, second)]
    heard = next(value for key, value in first.items() if key in ("input_features", "input_values"))
    encoded = model.get_encoder()(heard)
    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(model)
    with mal.dialogue(["a", "b"]) as dialogue:
        for x, (logits, ids) in zip((first, second), clean, strict=True):
            assert torch.equal(model.generate(**x, **options), ids)
            assert torch.equal(model(**x).logits, logits)  # heard again, not written again
    assert dialogue.turns == [2, 2]
    assert mal.last_turn.skipped == 0
    torch.nn.init.normal_(mal.memory.to_out.weight)
    with mal.disable_adapter():
        assert torch.equal(model(**first).logits, clean[0][0])
    assert not torch.isclose(model(**first).logits, clean[0][0]).all(-1).any()
    with mal.dialogue(["a", "b"]):  # the third turn remembers two
        remembering = model(**first).logits
    assert (remembering != model(**first).logits).any(-1).all()
    mal.detach()
    assert torch.equal(model(**first).logits, clean[0][0])
    assert torch.equal(model.get_encoder()(heard)[0], encoded[0])


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - {"whisper"}))  # it hears all of its window
def test_an_encoder_hears_only_what_is_not_padding(name):
    model = tiny_host(name)
    inputs = tiny_inputs(model, [[10], [3]])
    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(model)
    with mal.dialogue(["a", "b"]):
        model(**inputs)
    # the convolutions of Moonshine-Streaming carry sound three tokens on
    assert mal.last_turn.tokens == ([10, 6] if name == "moonshine_streaming" else [10, 3])


def test_an_interrupted_encoder_does_not_disturb_the_next_call():
    model = tiny_host("whisper")
    inputs = tiny_inputs(model, [[5]])

    def stop(*_):
        raise KeyboardInterrupt

    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(model)
    with mal.dialogue("a") as dialogue:
        handle = model.model.decoder.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        model.generate(**inputs)
    assert dialogue.turns == [1]


def test_an_encoder_is_the_only_site_and_runs_once():
    model = tiny_host("whisper")
    with pytest.raises(HostError, match=r"site=1.*encoder; pass site='embeds'"):
        MALAdapter(MALConfig(site=1)).attach(model)
    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(model)
    inputs = tiny_inputs(model, [[5]])
    long = torch.cat([inputs["input_features"]] * 2, -1)
    model.generation_config.no_timestamps_token_id = 50
    with mal.dialogue("a") as dialogue, pytest.raises(HostError, match="encoder ran again"):
        model.generate(long, attention_mask=torch.ones(1, 80), return_timestamps=True)
    assert dialogue.turns == [0]


# --- audio in every step --------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("site", ["embeds", 1, 2])
def test_a_streaming_host_writes_what_all_steps_heard(name, site):
    model = tiny_host(name).requires_grad_(False)
    first, second = (tiny_inputs(model, [[8], [8]], seed=seed) for seed in range(2))
    asked = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    clean = [model.generate(**x, **asked).logits for x in (first, second)]
    # four tokens more than the first; the prompt of Moshi has one of its own before the eight
    steps = {"kyutai_speech_to_text": 1, "voxtral_realtime": 2, "moshi": 9}[name] + 3

    mal = MALAdapter(MALConfig(heads=2, head_dim=8, site=site)).attach(model)
    with mal.dialogue(["a", "b"]) as dialogue:
        for x, expected in zip((first, second), clean, strict=True):
            for before, after in zip(expected, model.generate(**x, **asked).logits, strict=True):
                assert torch.equal(before, after)
        assert mal.last_turn.tokens == [steps, steps]
        assert dialogue.turns == [2, 2]
        torch.nn.init.normal_(mal.memory.to_out.weight)
        with mal.disable_adapter():
            assert torch.equal(model.generate(**first, **asked).logits[-1], clean[0][-1])
        remembering = model.generate(**first, **asked).logits[0]
        dialogue.undo()
        assert torch.equal(model.generate(**first, **asked).logits[0], remembering)
    assert (remembering != model.generate(**first, **asked).logits[0]).any(-1).all()


def test_what_a_streaming_host_writes_is_one_clip():
    model = tiny_host("voxtral_realtime").requires_grad_(False)
    inputs = tiny_inputs(model, [[8]])
    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(model)
    with mal.dialogue("steps"):
        ids = model.generate(**inputs, max_new_tokens=4)
    with mal.dialogue("at once"):
        heard = ids[:, :-1]
        features = inputs["input_features"][..., : 8 * heard.shape[1]]
        model(input_ids=heard, input_features=features, num_delay_tokens=2)
    states = [mal.dialogues.latest(name).states[None].tensors() for name in mal.dialogues]
    for x, y in zip(*states, strict=True):
        torch.testing.assert_close(x, y)


def test_a_streaming_host_has_no_beams():
    model = tiny_host("voxtral_realtime")
    inputs = tiny_inputs(model, [[8]])
    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(model)
    with mal.dialogue("a") as dialogue, pytest.raises(HostError, match="use num_beams=1"):
        model.generate(**inputs, num_beams=2, max_new_tokens=3)
    assert dialogue.turns == [0]


# --- audio given as embeddings --------------------------------------------------------------------


@pytest.fixture
def llama():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=2)).eval()


def spoken(rows: int, *, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A prompt of 9 embeddings with clips at 2..4 and 6..7, and where they are."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(rows, 9, 16, generator=generator)
    mask = torch.zeros(rows, 9, dtype=torch.bool)
    mask[:, 2:5] = mask[:, 6:8] = True
    return {"inputs_embeds": embeds, "attention_mask": torch.ones(rows, 9, dtype=torch.long)}, mask


@pytest.mark.parametrize("site", ["embeds", 1])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_text_model_hears_where_the_mask_says(llama, site, options):
    inputs, mask = spoken(2)
    options = {"max_new_tokens": 3, "do_sample": False, **options}
    llama.requires_grad_(False)
    clean = llama(**inputs).logits
    said = llama.generate(**inputs, **options)
    mal = MALAdapter(MALConfig(heads=2, head_dim=8, site=site)).attach(llama)
    with mal.dialogue(["a", "b"]) as dialogue, mal.audio_mask(mask):
        assert torch.equal(llama.generate(**inputs, **options), said)
        assert dialogue.turns == [2, 2]
        assert mal.last_turn.tokens == [5, 5]
        llama.generate(**inputs, **options)  # the same clips again
        assert dialogue.turns == [2, 2]
    torch.nn.init.normal_(mal.memory.to_out.weight)
    assert torch.equal(llama(**inputs).logits, clean)  # no mask, no audio
    with mal.audio_mask(mask):
        same = (llama(**inputs).logits == clean).all(-1)
    assert same[:, :2].all()
    assert not same[:, 2:].any()


def test_a_mask_stands_in_for_audio_tokens():
    model = tiny_host("voxtral")
    inputs = tiny_inputs(model, [[5]])
    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(model)
    torch.nn.init.normal_(mal.memory.to_out.weight)
    by_token = model(**inputs).logits
    seen = []
    with (
        mal.disable_adapter(),
        model.get_decoder().register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        ),
    ):
        model(**inputs)
    with mal.audio_mask(inputs["input_ids"] == model.config.audio_token_id):
        by_mask = model(inputs_embeds=seen[0], attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(by_mask, by_token)


def test_bad_masks_are_refused(llama):
    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(llama)
    inputs, mask = spoken(2)
    for bad in (mask.long(), mask[0], [[True]]):
        with (
            pytest.raises(ArgumentError, match=r"mask is .*pass a bool tensor"),
            mal.audio_mask(bad),
        ):
            pass
    for bad in (mask[:, 1:], mask[[0, 0, 0]]):
        with (
            mal.audio_mask(bad),
            pytest.raises(HostError, match=r"for a call of \[2, 9\] rows and positions"),
        ):
            llama(**inputs)
    assert torch.equal(llama(**inputs).logits, llama(**inputs).logits)


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
    waves = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert fingerprint(waves) == [7591935847082408225, 6755630723010580507]
    frames = torch.arange(24, dtype=torch.float32).view(2, 4, 3)
    marks = fingerprint(frames, torch.tensor([[1, 1, 0], [1, 1, 1]]), key=b"key")
    assert marks == [-4865714824108103522, 6123487497203897873]
