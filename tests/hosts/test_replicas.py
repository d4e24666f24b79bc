"""Hosts that transformers does not have: the trap of each, and that it catches no adapter."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from mal_kernels import MALAdapter, MALConfig
from mal_kernels.errors import ArgumentError, HostError
from mal_kernels.hosts import Host, placed
from mal_kernels.testing import tiny_host, tiny_inputs
from mal_kernels.testing.hosts.recipes import BEGIN, END
from mal_kernels.testing.hosts.replicas import REPLICAS

ENCODERS = {name: REPLICAS[name] for name in ("audio_flamingo", "audio_flamingo_2")}
SITES = [
    (name, site)
    for name in REPLICAS
    for site in ("embeds", 1)
    if site == "embeds" or name not in ENCODERS
]
on_every_site = pytest.mark.parametrize(("name", "site"), SITES)
on_every_host = pytest.mark.parametrize("name", REPLICAS)
BEAMS = [name for name in REPLICAS if name not in ("ltu", "qwen_audio")]  # they have none
RAGGED = ("ultravox", "salmonn_2", "qwen_audio")  # any number of clips, of any lengths
CHANGED = {"audio_flamingo": [5, 3], "audio_flamingo_2": [15, 9], "salmonn": [5, 5], "ltu": [5, 5]}


def prompt(host, seed: int = 0):
    clips = [[5, 4], [3]] if isinstance(host, tuple(REPLICAS[n] for n in RAGGED)) else [[5], [3]]
    return tiny_inputs(host, clips, seed=seed)


@contextmanager
def attached(host, site="embeds", *, trained=True):
    torch.manual_seed(1)
    mal = MALAdapter(MALConfig(heads=2, head_dim=8, site=site)).attach(host)
    if trained:
        torch.nn.init.normal_(mal.memory.to_out.weight, std=0.5)
    try:
        yield mal
    finally:
        mal.detach()


def frozen(name):
    return tiny_host(name).requires_grad_(False)


@torch.no_grad()
def logits(host, inputs):
    return host(**inputs).logits


def audio_positions(name, inputs):
    """Where the audio is among the hidden states, by the layout of the prompt alone."""
    if name == "ultravox":
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        rows = torch.arange(len(mask)).repeat_interleave(inputs["audio_batch_size"])
        bounds = (inputs["audio_token_start_idx"], inputs["audio_token_len"])
        for row, start, length in zip(rows, *bounds, strict=True):
            mask[row, start : start + length] = True
        return mask
    if name == "salmonn":  # first token, three of text, audio, two and two of text
        return torch.tensor([[False] * 4 + [True] * 5 + [False] * 4] * 2)
    if name == "salmonn_2":  # a time after every four tokens and after the last
        first = [False] * 3 + [True] * 4 + [False, True, False] + [False] * 3 + [True] * 4
        rows = [[*first, *[False] * 3], [*[False] * 3, *[True] * 3, *[False] * 14]]
        return torch.tensor(rows)
    if name == "ltu":
        return torch.tensor([[True] * 5 + [False] * 4] * 2)
    ids = inputs["input_ids"]
    return ((ids == BEGIN).cumsum(1) - (ids == END).cumsum(1)).bool() & (ids != BEGIN)


# --- the traps ------------------------------------------------------------------------------------


def calls(module, run) -> int:
    """How often a forward hook of ``module`` fires."""
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    run()
    handle.remove()
    return len(seen)


@torch.no_grad()
def test_every_replica_has_its_trap():
    host = frozen("ultravox")
    x = prompt(host)
    assert calls(host.multi_modal_projector, lambda: host(**x)) == 0
    assert calls(host.language_model, lambda: host(**x)) == 0
    assert calls(host, lambda: host.generate(**x, max_new_tokens=2)) == 0

    host = frozen("salmonn")
    x = prompt(host)
    assert list(x) == ["samples"]
    assert not hasattr(host, "config")
    assert calls(host, lambda: host.generate(**x, max_new_tokens=2)) == 0

    host = frozen("salmonn_2")
    x = prompt(host)
    assert logits(host, x).shape[1] > x["input_ids"].shape[1]

    host = frozen("ltu")
    x = prompt(host)
    assert host.config.model_type == "llama"
    assert logits(host, x).shape[1] == x["input_ids"].shape[1]
    assert calls(host.model.audio_proj, lambda: host.generate(**x, max_new_tokens=3)) == 3

    host = frozen("qwen_audio")
    assert not hasattr(host.transformer, "layers")

    for name in ENCODERS:
        host = frozen(name)
        x = prompt(host)
        assert logits(host, x).shape[1] == x["lang_x"].shape[1]
        assert calls(host, lambda h=host, x=x: h.generate(**x, max_new_tokens=2)) == 0


# --- the battery ----------------------------------------------------------------------------------


@on_every_site
def test_untrained_and_disabled_adapters_change_no_bit(name, site):
    host = frozen(name)
    x = prompt(host)
    clean, said = logits(host, x), host.generate(**x, max_new_tokens=3)
    with attached(host, site, trained=False) as mal, mal.dialogue(["a", "b"]):
        assert torch.equal(logits(host, x), clean)
        assert torch.equal(host.generate(**x, max_new_tokens=3), said)
    with attached(host, site) as mal:
        with mal.dialogue(["a", "b"]) as dialogue, mal.disable_adapter():
            assert torch.equal(logits(host, x), clean)
            assert torch.equal(host.generate(**x, max_new_tokens=3), said)
        assert dialogue.turns == [0, 0]
        assert not torch.equal(logits(host, x), clean)
    assert torch.equal(logits(host, x), clean)


@pytest.mark.parametrize(("name", "site"), [pair for pair in SITES if pair[0] not in ENCODERS])
def test_a_residual_changes_exactly_the_audio_positions(name, site):
    host = frozen(name)
    x, found = prompt(host), Host.of(host)

    def at_site():
        seen = []
        if site == "embeds":
            handle = found.site(site).register_forward_pre_hook(
                lambda m, args, kwargs: seen.append(args[0] if args else kwargs["inputs_embeds"]),
                with_kwargs=True,
            )
        else:
            handle = found.site(site).register_forward_hook(
                lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
        answered = logits(host, x)
        handle.remove()
        return seen[0].clone(), answered

    before, clean = at_site()
    with attached(host, site) as mal:
        after, answered = at_site()
        assert mal.last_turn.tokens == audio_positions(name, x).sum(1).tolist()
    assert torch.equal((before != after).any(-1), audio_positions(name, x))
    assert (clean[:, -1] != answered[:, -1]).any(-1).all()


@pytest.mark.parametrize(
    ("name", "site", "how"),
    [
        (name, site, how)
        for name, site in SITES
        for how in ("forward", "generate", "beams")
        if how != "beams" or name in BEAMS
    ],
)
def test_a_call_writes_once_and_the_next_one_reads_it(name, site, how):
    host = frozen(name)
    first, second = prompt(host), prompt(host, seed=1)
    if how == "beams" and name in ENCODERS:  # the model repeats its audio, but not its mask
        first["audio_x_mask"] = first["audio_x_mask"].repeat_interleave(2, 0)
    if how == "beams" and name in RAGGED:
        first = tiny_inputs(host, [[5], [3]])
    options = {"max_new_tokens": 3, **({"num_beams": 2} if how == "beams" else {})}
    with attached(host, site) as mal:
        with mal.dialogue(["a", "b"]) as dialogue:
            if how == "forward":
                logits(host, first)
            else:
                host.generate(**first, **options)
            once = dialogue.turns
            assert all(once)
            heard = mal.last_turn.tokens
            expected = CHANGED.get(name) or audio_positions(name, first).sum(1).tolist()
            assert heard == (expected if how != "beams" or name not in RAGGED else [5, 3])
            remembering = logits(host, second)
            dialogue.undo()
            dialogue.undo()
            assert dialogue.turns == [0, 0]
        forgotten = logits(host, second)
    assert (remembering[:, -1] != forgotten[:, -1]).any(-1).all()


@on_every_host
def test_clips_are_known_again(name):
    host = frozen(name)
    x = prompt(host)
    with attached(host) as mal, mal.dialogue(["a", "b"]) as dialogue:
        logits(host, x)
        once = dialogue.turns
        host.generate(**x, max_new_tokens=2)
        assert dialogue.turns == once
        logits(host, prompt(host, seed=1))
        assert dialogue.turns == [2 * n for n in once]


def pick(value, row: int, clips: slice, sizes: tuple[int, int]):
    """Row ``row`` of everything in a prompt, with its clips."""
    if isinstance(value, dict):
        return {key: pick(x, row, clips, sizes) for key, x in value.items()}
    if len(value) == 1:
        return value
    return value[clips] if len(value) == sizes[1] else value[row : row + 1]


@on_every_host
def test_each_row_of_a_batch_is_as_if_alone(name):
    host = frozen(name)
    x, y = prompt(host), prompt(host, seed=1)
    counts = [2, 1] if name in RAGGED else [1, 1]
    with attached(host) as mal:
        with mal.dialogue(["a", "b"]):
            logits(host, x)
            together = logits(host, y)
        for row, start in enumerate((0, counts[0])):
            clips = slice(start, start + counts[row])
            with mal.dialogue("alone") as dialogue:
                dialogue.reset()
                for batch in (x, y):
                    alone = logits(host, pick(batch, row, clips, (2, sum(counts))))[0]
            length = min(len(alone), together.shape[1])
            side = slice(-length, None) if name == "qwen_audio" else slice(length)
            keep = slice(None) if name != "salmonn_2" else slice(length)
            torch.testing.assert_close(together[row, side], alone[keep], rtol=1e-4, atol=1e-5)


@on_every_site
def test_gradients_reach_the_adapter_and_not_the_host(name, site):
    host = tiny_host(name)
    with attached(host, site) as mal:
        with mal.dialogue(["a", "b"]):
            *_, last = [host(**prompt(host, seed)).logits[:, -1] for seed in range(2)]
        last.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mal.parameters())
        assert mal.memory.to_k.weight.grad.any()
        assert all(p.grad is None for p in host.parameters())


@on_every_site
def test_detach_leaves_nothing_behind(name, site):
    host = tiny_host(name)

    def everything():
        modules = list(host.named_modules())
        hooks = [(path, len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in modules]
        return (
            hooks,
            [sorted(vars(m)) for _, m in modules],
            [p.requires_grad for p in host.parameters()],
        )

    x = prompt(host)
    host.generate(**x, max_new_tokens=2)
    before = everything()
    with attached(host, site):
        assert everything() != before
        host.generate(**x, max_new_tokens=2)
    assert everything() == before


@on_every_site
def test_an_interrupted_call_leaves_no_turn_behind(name, site):
    host = frozen(name)
    x = prompt(host)
    part = Host.of(host)
    layer = host.lang_encoder.model if name in ENCODERS else part.decoder
    last = (getattr(layer, "layers", None) or layer.h)[-1]

    def stop(*_):
        raise KeyboardInterrupt

    with attached(host, site) as mal, mal.dialogue(["a", "b"]) as dialogue:
        for run in (lambda: logits(host, x), lambda: host.generate(**x, max_new_tokens=2)):
            handle = last.register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                run()
            handle.remove()
            assert dialogue.turns == [0, 0]
        logits(host, x)
        assert all(dialogue.turns)


# --- bad input ------------------------------------------------------------------------------------


def test_audio_that_is_changed_after_the_projector_is_not_found():
    host = frozen("ultravox")
    own = host._prepare_audio_embeds
    host._prepare_audio_embeds = lambda *args, **kwargs: own(*args, **kwargs) * 2
    with attached(host) as mal, mal.dialogue(["a", "b"]) as dialogue:
        for run in (host, partial(host.generate, max_new_tokens=2)):
            with pytest.raises(
                HostError, match=r"none of the embeddings that 'multi_modal_pro.*HostSpec"
            ):
                run(**prompt(host))
    assert dialogue.turns == [0, 0]


def test_audio_that_does_not_reach_the_decoder():
    host = frozen("ultravox")
    with attached(host) as mal, mal.dialogue(["a", "b"]) as dialogue:
        host.language_model.model = host.language_model.model.__class__(host.language_model.config)
        with pytest.raises(HostError, match="no hidden states passed the site"):
            host(**prompt(host))
    assert dialogue.turns == [0, 0]


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_number_of_dialogues(call):
    for name in REPLICAS:
        host = frozen(name)
        with attached(host) as mal, mal.dialogue(["a", "b", "c"]):
            run = host if call == "forward" else partial(host.generate, max_new_tokens=2)
            with pytest.raises(ArgumentError, match="batch of 2 rows"):
                run(**prompt(host))


def test_text_alone_is_no_turn():
    host = frozen("ultravox")
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    clean = logits(host, text)
    with attached(host) as mal, mal.dialogue("a") as dialogue:
        assert torch.equal(logits(host, text), clean)
        # nor is what the projector returns to anybody but the model
        host.multi_modal_projector(torch.zeros(1, 2, 16))
        assert torch.equal(logits(host, text), clean)
    assert dialogue.turns == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_found_by_their_bits(dtype):
    embeds = torch.randn(2, 5, 4).to(dtype)
    embeds[0, 4] = 0
    audio = torch.stack([embeds[0, 1], embeds[1, 3], torch.zeros(4, dtype=dtype)]).float()
    close = embeds[0, 2] * (1 + 2 * torch.finfo(dtype).eps)
    found = placed(embeds, [audio[None], close[None]])
    assert found.nonzero().tolist() == [[0, 1], [1, 3]]
