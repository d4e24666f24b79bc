"""The adapter on every kind of host it knows: real transformers classes, only tiny."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import pytest
import torch
import transformers

from mal_kernels import MALAdapter, MALConfig
from mal_kernels.errors import HostError
from mal_kernels.hosts import Host
from mal_kernels.testing.hosts import RECIPES, tiny_host, tiny_inputs

SITES = ("embeds", "layer")
CLIPS = [[5, 4], [3]]

pytestmark = [
    pytest.mark.parametrize("name", RECIPES),
    # VibeVoice-ASR of transformers before 5.20 warns of itself
    pytest.mark.filterwarnings("ignore:.acoustic_tokenizer_chunk_size:FutureWarning"),
]


@functools.cache
def host_of(name: str) -> Host:
    if not hasattr(transformers, RECIPES[name].model):
        pytest.skip(f"transformers {transformers.__version__} has no {RECIPES[name].model}")
    # frozen from the start: PyTorch multiplies by a weight that requires grad in another way, and
    # the last bit differs
    return Host.of(tiny_host(name).requires_grad_(False))


@contextmanager
def attached(host: Host, site: str, *, trained: bool = True):
    torch.manual_seed(1)
    where = last_layer(host) if site == "layer" else site
    mal = MALAdapter(MALConfig(heads=2, head_dim=8, site=where)).attach(host.whole)
    if trained:
        torch.nn.init.normal_(mal.memory.to_out.weight, std=0.5)
    try:
        yield mal
    finally:
        mal.detach()


def last_layer(host: Host) -> int:
    return host.spec.last_layer(host.decoder)


@torch.no_grad()
def logits(host: Host, inputs) -> torch.Tensor:
    return host.model(**inputs).logits


def generate(host: Host, inputs, **options) -> list[torch.Tensor]:
    """Tokens and the logits of every step."""
    torch.manual_seed(0)  # VibeVoice speaks with noise
    asked = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3}
    out = host.model.generate(**inputs, **asked, **options)
    return [out.sequences, *out.logits]


def identical(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def at_site(host: Host, site: str, inputs) -> torch.Tensor:
    """Hidden states ``[B, S, Dm]`` (with several streams ``[N, B, S, Dm]``) behind all hooks."""
    seen = []
    if site == "layer":
        module = host.decoder.layers[last_layer(host)]
        handle = module.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    else:
        names = ("inputs_embeds", "hidden_states")
        handle = host.site("embeds").register_forward_pre_hook(
            lambda m, args, kwargs: seen.extend([*args[:1], *map(kwargs.get, names)]),
            with_kwargs=True,
        )
    logits(host, inputs)
    handle.remove()
    return next(x for x in seen if x is not None)


def row_alone(name: str, inputs, row: int):
    """Row ``row`` of ``CLIPS`` as a batch of its own, without padding."""
    keep = inputs["attention_mask"][row].bool()
    first = sum(map(len, CLIPS[:row]))
    clips = slice(first, first + len(CLIPS[row]))
    if RECIPES[name].rows:
        clips = slice(row, row + 1)
    alone = {
        key: x[clips] if isinstance(x, torch.Tensor) else x
        for key, x in inputs.items()
        if key not in ("input_ids", "attention_mask")
    }
    if "padding_mask" in alone and "input_values" in alone:  # nor of the clips
        longest = int(alone["padding_mask"].sum(1).max())
        alone |= {key: alone[key][..., :longest] for key in ("padding_mask", "input_values")}
    ids = inputs["input_ids"][row : row + 1, keep]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **alone}


@pytest.mark.parametrize("site", SITES)
def test_untrained_and_disabled_adapters_change_no_bit(name, site):
    host = host_of(name)
    inputs = tiny_inputs(host.whole, CLIPS)
    before, steps = logits(host, inputs), generate(host, inputs)

    untrained = attached(host, site, trained=False)
    with untrained as mal, mal.dialogue(["a", "b"]) as dialogue:
        assert torch.equal(logits(host, inputs), before)
        assert identical(generate(host, inputs), steps)
    assert dialogue.turns == [2, 1]  # the same clips again are not written again

    with attached(host, site) as mal:
        with mal.dialogue(["a", "b"]) as dialogue, mal.disable_adapter():
            assert torch.equal(logits(host, inputs), before)
            assert identical(generate(host, inputs), steps)
        assert dialogue.turns == [0, 0]
        assert not torch.equal(logits(host, inputs), before)


@pytest.mark.parametrize("site", SITES)
def test_a_residual_changes_exactly_the_audio_positions(name, site):
    host = host_of(name)
    inputs = tiny_inputs(host.whole, [[5, 2], [3]])
    audio = inputs["input_ids"] == host.audio_tokens[0]
    before, clean = at_site(host, site, inputs), logits(host, inputs)
    with attached(host, site):
        after, answered = at_site(host, site, inputs), logits(host, inputs)
    changed = (before != after).any(-1)
    if changed.dim() == 3:  # all streams but one are as they were
        assert changed.any((1, 2)).nonzero().tolist() == [[host.decoder.config.altup_active_idx]]
        changed = changed.any(0)
    assert torch.equal(changed, audio)
    earlier = (audio.cumsum(1) == 0) & inputs["attention_mask"].bool()
    # the tokens of an expert are one matrix, and another number of rows rounds differently
    atol = 1e-7 if hasattr(host.decoder.config, "num_experts_per_tok") else 0
    torch.testing.assert_close(clean[earlier], answered[earlier], rtol=0, atol=atol)
    assert (clean[:, -1] != answered[:, -1]).any(-1).all()
    assert torch.equal(logits(host, inputs), clean)


@pytest.mark.parametrize("site", SITES)
def test_a_call_writes_once_and_the_next_one_reads_it(name, site):
    host = host_of(name)
    first, second = (tiny_inputs(host.whole, [[4], [3]], seed=seed) for seed in range(2))
    decodings = {"greedy": {}, "beams": {"num_beams": 2}}
    if not RECIPES[name].beams:
        decodings["beams"] = {"do_sample": True}
    with attached(host, site) as mal:
        for how, options in decodings.items():
            with mal.dialogue([how, "b"]) as dialogue:
                generate(host, first, **options)
                assert dialogue.turns == [1, 1]
                heard = (first["input_ids"] == host.audio_tokens[0]).sum(1)
                assert mal.last_turn.tokens == heard.tolist()
                assert mal.last_turn.skipped == 0
                remembering = logits(host, second)
                assert dialogue.turns == [2, 2]
                dialogue.store.forget(["b"])
        forgotten = logits(host, second)
    assert (remembering[:, -1] != forgotten[:, -1]).any(-1).all()
    one, other = (mal.dialogues.latest(how).states[None] for how in decodings)
    for x, y in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_each_row_of_a_batch_is_as_if_alone(name):
    host = host_of(name)
    inputs = tiny_inputs(host.whole, CLIPS)
    with attached(host, "embeds"):
        together = logits(host, inputs)
        for row in range(len(CLIPS)):
            alone = logits(host, row_alone(name, inputs, row))[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, rtol=1e-4, atol=1e-5)


def test_clips_are_known_again_by_what_is_heard(name):
    host = host_of(name)
    marks = [
        [clip.fingerprint for row in host.clips(inputs, fingerprints=True) for clip in row]
        for inputs in (tiny_inputs(host.whole, CLIPS, seed=seed) for seed in (0, 0, 1))
    ]
    assert marks[0] == marks[1]
    assert len({*marks[0], *marks[2]}) == 6
    assert None not in marks[0]


def test_no_layer_after_the_last_effective_one_reaches_the_text(name):
    host = host_of(name)
    inputs = tiny_inputs(host.whole, [[4], [3]])
    audio = inputs["input_ids"] == host.audio_tokens[0]
    clean = logits(host, inputs)[~audio]

    def reaches_text(layer: int) -> bool:
        # directions differ, or a norm would take the change out again
        push = torch.randn(host.hidden_size, generator=torch.Generator().manual_seed(0))

        def pushed(_layer, _args, output):
            hidden, put = host.hidden_of(output)
            return put(hidden + audio[..., None] * push)

        handle = host.decoder.layers[layer].register_forward_hook(pushed)
        text = logits(host, inputs)[~audio]
        handle.remove()
        return not torch.equal(text, clean)

    last = last_layer(host)
    assert last > 0
    assert reaches_text(last)
    assert not any(map(reaches_text, range(last + 1, len(host.decoder.layers))))
    mal = MALAdapter(MALConfig(heads=2, head_dim=8, site=last + 1))
    with pytest.raises(HostError, match=rf"site={last + 1}.*site <= {last} or 'embeds'"):
        mal.attach(host.whole)


@pytest.mark.parametrize("site", SITES)
def test_detach_leaves_nothing_behind(name, site):
    host = host_of(name)

    def everything():
        modules = list(host.whole.named_modules())
        hooks = [(path, len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in modules]
        attributes = [sorted(vars(m)) for _, m in modules]
        trains = [p.requires_grad for p in host.whole.parameters()]
        return hooks, attributes, trains

    inputs = tiny_inputs(host.whole, CLIPS)
    generate(host, inputs)  # after which transformers leaves hooks of its own
    trained = next(host.whole.parameters()).requires_grad_(True)
    before = everything()
    with attached(host, site):
        assert not any(p.requires_grad for p in host.whole.parameters())
        generate(host, inputs)
    assert everything() == before
    trained.requires_grad_(False)


@pytest.mark.parametrize("site", SITES)
def test_gradients_reach_the_adapter_also_through_checkpoints(name, site):
    host = host_of(name)
    # no padding: the norm of its embedding, which is zero here, has no gradient in Gemma 3n
    turns = [tiny_inputs(host.whole, [[5, 3], [3, 5]], seed=seed) for seed in range(2)]

    def gradients(mal: MALAdapter) -> list[torch.Tensor | None]:
        mal.zero_grad()
        with mal.dialogue(["a", "b"]):
            *_, last = [host.model(**turn).logits[:, -1] for turn in turns]
            last.square().sum().backward()
        mal.dialogues.forget()
        return [p.grad for p in mal.memory.parameters()]

    with attached(host, site) as mal:
        plain = gradients(mal)
        assert all(g is not None and g.isfinite().all() for g in plain)
        assert all(g.any() for g in plain)
        if not host.model.supports_gradient_checkpointing:
            return
        host.decoder.train()
        # transformers 5.23 has new names for it
        new = hasattr(host.model, "activation_checkpointing_enable")
        switch = "activation_checkpointing_{}" if new else "gradient_checkpointing_{}"
        getattr(host.model, switch.format("enable"))({"use_reentrant": False})
        try:
            checkpointed = gradients(mal)
        finally:
            getattr(host.model, switch.format("disable"))()
            host.decoder.eval()
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)
