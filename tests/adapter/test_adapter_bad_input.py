"""Bad input is refused with what to do, before anything changes."""

from __future__ import annotations

import pytest
import torch

from mal_kernels import MALAdapter, MALConfig, hosts
from mal_kernels.errors import ArgumentError, HostError
from mal_kernels.testing import tiny_host, tiny_inputs
from tests.support.adapters import CONFIG, SITES, attached, everything_on


def test_attach_refuses_before_it_changes_anything(host):
    before = everything_on(host)
    for mal, match in (
        (MALAdapter(MALConfig(site=2)), r"site=2.*pass site <= 1 or 'embeds'"),
        (MALAdapter(MALConfig(hidden_size=16)), r"hidden_size is 16, but .* has 32"),
    ):
        with pytest.raises(HostError, match=match):
            mal.attach(host)
        assert everything_on(host) == before
    mal = MALAdapter(CONFIG).attach(host)
    with pytest.raises(HostError, match=r"attached to a Qwen2Audio.* already.*detach"):
        mal.attach(tiny_host("qwen2_audio"))
    with pytest.raises(HostError, match=r"has an adapter already.*detach"):
        MALAdapter(CONFIG).attach(host)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_number_of_dialogues(host, call):
    mal = attached(host)
    x = tiny_inputs(host, [[5], [3]])
    run = host if call == "forward" else host.generate
    with (
        mal.dialogue(["a", "b", "c"]),
        pytest.raises(ArgumentError, match=r"ids has 3 .* batch of 2 rows.*one id per row"),
    ):
        run(**x)
    with mal.dialogue("a"), pytest.raises(ArgumentError, match=r"ids has 1 .* batch of 2 rows"):
        run(**x)
    assert len(mal.dialogues) == 0


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_prompt_that_the_processor_did_not_expand(host, site, call, monkeypatch):
    x = tiny_inputs(host, [[5]])
    ids = x["input_ids"]
    one = (ids != host.config.audio_token_id) | (torch.arange(ids.shape[1]) == 4)
    assert int((ids[one] == host.config.audio_token_id).sum()) == 1
    x["input_ids"], x["attention_mask"] = ids[one][None], x["attention_mask"][one][None]
    mal = attached(host, site)
    run = host if call == "forward" else host.generate
    with mal.dialogue("a"), pytest.raises(HostError, match=r"one placeholder per audio token"):
        run(**x)
    assert len(mal.dialogues) == 0
    # and if the host is said to have clips of one token, it shows where they are put
    mal.detach()
    monkeypatch.setitem(
        hosts.spec.SPECS, "qwen2_audio", hosts.HostSpec("qwen2_audio", min_clip_tokens=1)
    )
    mal.attach(host)
    with mal.dialogue("a"), pytest.raises(HostError, match=r"changed the length of the prompt"):
        host(**x)
    assert len(mal.dialogues) == 0


def test_audio_without_input_ids(host):
    x = tiny_inputs(host, [[5]])
    mal = attached(host)
    embeds = host.get_input_embeddings()(x.pop("input_ids"))
    with mal.dialogue("a"), pytest.raises(HostError, match="input_ids is None"):
        host(inputs_embeds=embeds, **x)
    assert len(mal.dialogues) == 0


def test_a_host_that_does_not_pass_the_site(host, monkeypatch):
    aside = tiny_host("qwen2_audio").model.language_model
    spec = hosts.HostSpec("qwen2_audio", decoder=lambda _: aside)
    monkeypatch.setitem(hosts.spec.SPECS, "qwen2_audio", spec)
    mal = attached(host)
    for run in (host, host.generate):
        with mal.dialogue("a"), pytest.raises(HostError, match="no hidden states passed the site"):
            run(**tiny_inputs(host, [[5]]))
    assert len(mal.dialogues) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("site", "layer"),
        ("site", -1),
        ("site", True),
        ("heads", 0),
        ("heads", 2.0),
        ("head_dim", "8"),
        ("depth", None),
        ("activation", "tanh"),
        ("residual_norm", 1),
        ("max_lr", float("nan")),
        ("momentum_init", 1.0),
        ("decay_init", 0),
        ("max_grad_norm", -1.0),
        ("lr_init", (0.1, 0.2)),
        ("lr_init", (0.1, 0.2, 0.3, 0.5)),
        ("lr_init", 0.1),
        ("hidden_size", 0),
        ("base_model_name_or_path", 3),
    ],
)
def test_config_values(field, value):
    with pytest.raises(ArgumentError, match=rf"MALConfig.{field} is .*; pass "):
        MALConfig(**{field: value})
