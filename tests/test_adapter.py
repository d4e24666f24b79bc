"""MALAdapter on a real Qwen2-Audio, only tiny: identity, transactions, batches, training, files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext, suppress

import pytest
import torch
from transformers import LogitsProcessorList, StaticCache

from mal_kernels import MALAdapter, MALConfig, MemoryState, hosts
from mal_kernels.errors import ArgumentError, CheckpointError, HostError
from mal_kernels.testing import tiny_host, tiny_inputs

SITES = ("embeds", 1)
CONFIG = MALConfig(heads=2, head_dim=8)
DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 8},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture
def host():
    return tiny_host("qwen2_audio")


def attached(host, site="embeds", *, trained=True, freeze=True, **options) -> MALAdapter:
    torch.manual_seed(1)
    mal = MALAdapter(MALConfig(heads=2, head_dim=8, site=site, **options))
    mal.attach(host, freeze=freeze)
    if trained:
        torch.nn.init.normal_(mal.memory.to_out.weight, std=0.5)
    return mal


def checkpoint(host, **options) -> None:
    """Turns gradient checkpointing on; transformers 5.23 has a new name for it."""
    new = getattr(host, "activation_checkpointing_enable", None)
    (new or host.gradient_checkpointing_enable)(options)


def row_alone(inputs, row: int):
    """Row ``row`` of a batch as a batch of its own, without padding."""
    keep = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row : row + 1, keep]
    starts = [
        int((r[1:] & ~r[:-1]).sum()) for r in (inputs["input_ids"] == 60)
    ]  # a prompt starts with text
    clips = slice(sum(starts[:row]), sum(starts[: row + 1]))
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if starts[row]:
        for name in ("input_features", "feature_attention_mask"):
            one[name] = inputs[name][clips]
    return one


def states_of(mal: MALAdapter) -> dict[tuple[str, str | None], MemoryState]:
    return {
        (name, who): state
        for name in mal.dialogues
        for who, state in mal.dialogues.latest(name).states.items()
    }


def assert_same_states(a, b, **tolerance) -> None:
    assert a.keys() == b.keys()
    for key in a:
        for x, y in zip(a[key].tensors(), b[key].tensors(), strict=True):
            torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


def generate(host, inputs, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": 4, **options}
    out = host.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return [out.sequences, *out.logits]


def assert_identical(a, b) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("decoding", DECODING)
def test_untrained_and_disabled_adapters_change_no_bit(host, site, decoding):
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


def everything_on(host) -> dict[str, object]:
    """Hooks, own attributes and flags of every module, and of every parameter."""
    found = {}
    for path, module in host.named_modules():
        for name, value in vars(module).items():
            keys = sorted(map(str, value)) if isinstance(value, dict) else repr(type(value))
            found[path, name] = keys
        found[path, "checkpointing"] = getattr(module, "gradient_checkpointing", None)
    return found | {n: (p.requires_grad, p.data_ptr()) for n, p in host.named_parameters()}


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


def test_freeze_is_optional(host):
    mal = MALAdapter(CONFIG).attach(host, freeze=False)
    assert host.lm_head.weight.requires_grad
    mal.detach()
    assert host.lm_head.weight.requires_grad


# --- turns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("speaker", [None, ["A", None, "B"]])
def test_a_ragged_batch_is_each_dialogue_alone(host, site, side, speaker):
    shapes = [[[5], [2], [7]], [[3], [], [4]], [[2], [6, 3], []]]
    turns = [tiny_inputs(host, s, seed=i, side=side) for i, s in enumerate(shapes)]
    together, alone = attached(host, site), None
    ids = ["a", "b", "c"]
    outputs = []
    with together.dialogue(ids, speaker):
        for x in turns:
            logits = host(**x).logits
            outputs.append([logits[r, x["attention_mask"][r].bool()] for r in range(3)])
    together.detach()
    alone = attached(host, site)
    for row, name in enumerate(ids):
        with alone.dialogue(name, speaker and speaker[row]) as dialogue:
            for x, logits in zip(turns, outputs, strict=True):
                torch.testing.assert_close(
                    host(**row_alone(x, row)).logits[0], logits[row], rtol=1e-4, atol=1e-4
                )
        assert dialogue.turns == [sum(len(s[row]) for s in shapes)]
    assert_same_states(states_of(together), states_of(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_generate_and_forward_write_the_same(host, site):
    mal = attached(host, site)
    x = tiny_inputs(host, [[5], [3]])
    with mal.dialogue(["a", "b"]):
        host.generate(**x, max_new_tokens=5)
    by_generate = states_of(mal)
    assert not any(t.requires_grad for state in by_generate.values() for t in state.tensors())
    mal.dialogues.forget()
    with mal.dialogue(["a", "b"]), torch.no_grad():
        host(**x)
    assert_same_states(states_of(mal), by_generate, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("speaker", [None, "A"])
def test_several_clips_in_one_prompt_are_turns_in_order(host, speaker):
    mal = attached(host)
    x = tiny_inputs(host, [[5, 3, 4], [2]])
    with mal.dialogue(["a", "b"], speaker) as dialogue:
        host(**x)
    at_once = states_of(mal)
    assert dialogue.turns == [3, 1]
    assert mal.last_turn.tokens == [12, 2]

    mal.dialogues.forget()
    # the same audio, one clip per prompt; at the embeddings the text around it plays no part
    for row, clips in enumerate(([0, 1, 2], [3])):
        for clip in clips:
            tokens = int(x["feature_attention_mask"][clip].sum()) // 4
            one = tiny_inputs(host, [[tokens]], seed=9)
            one["input_features"] = x["input_features"][clip : clip + 1]
            with mal.dialogue("ab"[row], speaker):
                host(**one)
    assert_same_states(states_of(mal), at_once, rtol=1e-5, atol=1e-6)


def two_turns(host):
    """Turn 1, turn 2 alone, and turn 2 with the conversation of turn 1 before it."""
    both = tiny_inputs(host, [[5, 3]])
    ids, audio = both["input_ids"], both["input_ids"][0] == host.config.audio_token_id
    cut = int(audio.nonzero()[5]) - 1  # before the second clip's start marker
    first = {
        "input_ids": ids[:, :cut],
        "attention_mask": both["attention_mask"][:, :cut],
        "input_features": both["input_features"][:1],
        "feature_attention_mask": both["feature_attention_mask"][:1],
    }
    second = {
        "input_ids": ids[:, cut:],
        "attention_mask": both["attention_mask"][:, cut:],
        "input_features": both["input_features"][1:],
        "feature_attention_mask": both["feature_attention_mask"][1:],
    }
    return first, second, both


def test_clips_sent_again_are_read_but_not_written_again(host):
    mal = attached(host)
    first, second, both = two_turns(host)
    with mal.dialogue("once") as once:
        host.generate(**first, max_new_tokens=2)
        host.generate(**second, max_new_tokens=2)
    with mal.dialogue("again") as again:
        host.generate(**first, max_new_tokens=2)
        host.generate(**both, max_new_tokens=2)
        assert mal.last_turn.tokens == [3]
    assert once.turns == again.turns == [2]
    assert_same_states({0: once.state}, {0: again.state}, rtol=1e-5, atol=1e-6)
    # a retry writes nothing, and reads what is remembered now
    held = mal.dialogues.latest("again")
    before = host(**both).logits
    with mal.dialogue("again") as again:
        assert not torch.equal(host(**both).logits, before)
        assert mal.dialogues.latest("again") is held
        again.undo()
        assert again.turns == [1]
        host(**both)
        assert again.turns == [2]


def test_turns_continue_on_the_cache(host):
    mal = attached(host)
    first, second, both = two_turns(host)
    with mal.dialogue("new cache"):
        host.generate(**first, max_new_tokens=2)
        host.generate(**second, max_new_tokens=2)
    with mal.dialogue("one cache") as dialogue, torch.no_grad():
        cache = host(**first, use_cache=True).past_key_values
        out = host.generate(
            **{**second, "input_ids": both["input_ids"], "attention_mask": both["attention_mask"]},
            past_key_values=cache,
            max_new_tokens=3,
        )
    assert dialogue.turns == [2]
    assert out.shape[1] == both["input_ids"].shape[1] + 3
    states = states_of(mal)
    assert_same_states(
        {0: states["new cache", None]}, {0: states["one cache", None]}, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("site", SITES)
def test_beams_read_alike_and_write_once(host, site, monkeypatch):
    mal = attached(host, site)
    x = tiny_inputs(host, [[5], [3]])
    rows = []
    write = mal.memory.write
    monkeypatch.setattr(mal.memory, "write", lambda *a: rows.append(a[2].batch_size) or write(*a))
    with mal.dialogue(["a", "b"]):
        host.generate(**x, max_new_tokens=3)
    greedy = states_of(mal)
    for options in ({"num_beams": 3, "num_return_sequences": 2}, DECODING["several"]):
        mal.dialogues.forget()
        with mal.dialogue(["a", "b"]) as dialogue:
            host.generate(**x, max_new_tokens=3, **options)
        assert dialogue.turns == [1, 1]
        assert_same_states(states_of(mal), greedy, rtol=1e-5, atol=1e-6)
    assert rows == [2, 2, 2]
    # all beams see the residual: with one token they choose as greedy search does
    assert torch.equal(
        host.generate(**x, max_new_tokens=1),
        host.generate(**x, max_new_tokens=1, num_beams=3),
    )


def test_beams_that_the_host_mixes_up_are_refused(host):
    x = tiny_inputs(host, [[3, 3]])
    mal = attached(host)
    with pytest.raises(HostError, match="repeats audio inputs"):
        host.generate(**x, max_new_tokens=2, num_beams=2)
    with mal.dialogue("a") as dialogue, pytest.raises(HostError, match="repeats audio inputs"):
        host.generate(**x, max_new_tokens=2, num_beams=2)
    assert dialogue.turns == [0]


def test_undo_takes_back_one_call_of_every_row(host):
    mal = attached(host)
    with mal.dialogue(["a", "b"]) as dialogue:
        host(**tiny_inputs(host, [[5], [3]], seed=0))
        first = [mal.dialogues.latest(name) for name in dialogue.ids]
        host(**tiny_inputs(host, [[5, 2], []], seed=1))
        host(**tiny_inputs(host, [[], []], seed=2))  # without audio: no turn
        assert dialogue.turns == [3, 1]
        mal.undo()
        assert [mal.dialogues.latest(name) for name in dialogue.ids] == first
        dialogue.reset()
        assert dialogue.turns == [0, 0]
    with pytest.raises(ArgumentError, match=r"outside of dialogue"):
        mal.undo()


def test_a_speaker_is_read_alone_and_writes_the_shared_memory_too(host):
    mal = attached(host)
    x, y = (tiny_inputs(host, [[5]], seed=i) for i in range(2))
    fresh = host(**y).logits
    with mal.dialogue("a", speaker="A"):
        host(**x)
    with mal.dialogue("a", speaker="B"):
        assert torch.equal(host(**y).logits, fresh)  # B has said nothing yet
    # written beside the shared memory or alone: another batch, another rounding
    close = {"rtol": 1e-5, "atol": 1e-6}
    a, b, shared = (mal.dialogues.latest("a").states[who] for who in ("A", "B", None))
    with mal.dialogue("x"):
        host(**x)
        assert_same_states({0: a}, {0: mal.dialogues.latest("x").states[None]}, **close)
        host(**y)
    with mal.dialogue("y"):
        host(**y)
    assert_same_states({0: b}, {0: mal.dialogues.latest("y").states[None]}, **close)
    assert_same_states({0: shared}, {0: mal.dialogues.latest("x").states[None]}, **close)


def test_outside_of_a_dialogue_nothing_is_kept(host, monkeypatch):
    mal = attached(host)
    x = tiny_inputs(host, [[5, 3]])
    writes = []
    write = mal.memory.write
    monkeypatch.setattr(mal.memory, "write", lambda *a: writes.append(1) or write(*a))
    assert torch.equal(host(**x).logits, host(**x).logits)
    assert len(mal.dialogues) == 0
    assert len(writes) == 2  # the first clip, for the second to read; the second for nobody
    with mal.dialogue("a"):
        host(**x)
        with mal.dialogue("b"):
            host(**x)
        host(**tiny_inputs(host, [[4]], seed=5))
    assert [len(mal.dialogues.latest(name).clips) for name in ("a", "b")] == [3, 2]


def test_masked_rows_neither_read_nor_write(host):
    mal = attached(host)
    x = tiny_inputs(host, [[5], [5]])
    x["attention_mask"][1] = 0
    with mal.disable_adapter():
        plain = host(**x, output_hidden_states=True).hidden_states[0]
    with mal.dialogue(["a", "b"]) as dialogue:
        changed = (host(**x, output_hidden_states=True).hidden_states[0] != plain).any(-1)
    assert changed.sum(1).tolist() == [5, 0]
    assert dialogue.turns == [1, 0]
    assert mal.dialogues.latest("b").states == {}


def test_last_turn_reports(host):
    mal = attached(host)
    x = tiny_inputs(host, [[5, 2], [], [3]])
    with mal.dialogue(["a", "b", "c"], speaker="A"):
        plain = host(**x, output_hidden_states=True).hidden_states[0]
        report = mal.last_turn
    assert report.tokens == [7, 0, 3]
    assert report.skipped == 0
    assert report.surprise[[0, 2]].isfinite().all()
    assert report.surprise[1].isnan()
    mal.detach()
    tokens = x["input_ids"][2] == host.config.audio_token_id
    before = host(**x, output_hidden_states=True).hidden_states[0][2, tokens]
    ratio = (plain[2, tokens] - before).norm() / before.norm()
    torch.testing.assert_close(report.residual_ratio[2], ratio)
    lr, momentum, decay = mal.memory.rates(before, torch.tensor([0, 3]))
    torch.testing.assert_close(report.rates["lr"][2], lr.sum(0).detach())
    torch.testing.assert_close(report.rates["momentum"][2:], momentum.detach())
    torch.testing.assert_close(report.rates["decay"][2:], decay.detach())
    assert report.rates["lr"][1].isnan().all()
    assert not report.surprise.requires_grad


def test_a_write_that_is_not_finite_is_skipped_for_its_row_only(host):
    mal = attached(host)
    x = tiny_inputs(host, [[5], [3]])
    with mal.dialogue(["good", "alone"]):
        host(**x)
    x["input_features"][0] = torch.nan
    with mal.dialogue(["bad", "fine"]) as dialogue:
        host(**x)
        assert mal.last_turn.skipped == 1
        assert dialogue.state.is_finite().all()
    assert_same_states(
        {0: mal.dialogues.latest("fine").states[None]},
        {0: mal.dialogues.latest("alone").states[None]},
        rtol=1e-5,
        atol=1e-6,
    )
    # and no gradient is lost to it
    with mal.dialogue(["bad", "fine"]) as dialogue:
        dialogue.state.weights[0].sum().backward()
    assert mal.memory.to_v.weight.grad.isfinite().all()
    assert mal.memory.to_v.weight.grad.any()


def test_a_state_that_would_overflow_stays_as_it_was(host, monkeypatch):
    mal = attached(host)
    write, seen = mal.memory.write, []

    def overflow(tokens, cu_seqlens, state):
        update = write(tokens, cu_seqlens, state)
        seen.append(state.batch_size)
        if state.batch_size == 2:
            bad = torch.tensor([torch.inf, 1.0]).view(2, 1, 1, 1)
            return update._replace(state=update.state.map(lambda t: t * bad))
        return update

    monkeypatch.setattr(mal.memory, "write", overflow)
    with mal.dialogue(["a", "b"]) as dialogue:
        before = dialogue.state
        host(**tiny_inputs(host, [[5], [3]]))
        assert seen == [2, 1]
        assert mal.last_turn.skipped == 1
        assert torch.equal(dialogue.state.weights[0][0], before.weights[0][0])
        assert not torch.equal(dialogue.state.weights[0][1], before.weights[0][1])
    dialogue.state.weights[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mal.parameters())


# --- interruptions --------------------------------------------------------------------------------


def interrupt(kind: type[BaseException]):
    def raise_it(*_args, **_kwargs):
        raise kind("interrupted")

    return raise_it


def second_step(error: type[BaseException]):
    """A logits processor that raises in the second decode step."""
    steps = iter([False, True])

    def processor(_ids, scores):
        if next(steps):
            raise error("interrupted")
        return scores

    return LogitsProcessorList([processor])


def in_the_encoder(host, x, error):
    handle = host.model.audio_tower.register_forward_hook(interrupt(error))
    try:
        host.generate(**x, max_new_tokens=3)
    finally:
        handle.remove()


def in_the_prefill(host, x, error):
    handle = host.model.language_model.layers[2].register_forward_hook(interrupt(error))
    try:
        host.generate(**x, max_new_tokens=3)
    finally:
        handle.remove()


def in_a_decode_step(host, x, error):
    host.generate(**x, max_new_tokens=3, logits_processor=second_step(error))


def in_a_forward_call(host, x, error):
    handle = host.lm_head.register_forward_hook(interrupt(error))
    try:
        host(**x)
    finally:
        handle.remove()


def in_the_write(host, x, error):
    memory = host.generate.mal_adapter.memory
    memory.write = interrupt(error)
    try:
        host.generate(**x, max_new_tokens=3)
    finally:
        del memory.write


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "where",
    [in_the_encoder, in_the_prefill, in_a_decode_step, in_a_forward_call, in_the_write],
)
def test_an_interrupted_turn_leaves_everything_as_it_was(host, site, error, where):
    mal = attached(host, site)
    x, y = (tiny_inputs(host, [[5], [3]], seed=i) for i in range(2))
    ids = ["a", "b"]
    with mal.dialogue(ids, "A"):
        host.generate(**x, max_new_tokens=2)
        before, report = mal.dialogues._histories, mal.last_turn
        with pytest.raises(error, match="interrupted"):
            where(host, y, error)
        assert mal.dialogues._histories is before
        assert mal.last_turn is report
        # no later call inherits the audio of the failed one: text, one token, or the plain host
        for text in (tiny_inputs(host, [[], []]), {"input_ids": torch.tensor([[5], [6]])}):
            with mal.disable_adapter():
                logits = host(**text).logits
            with suppress(error):
                where(host, y, error)
            assert torch.equal(host(**text).logits, logits)
        assert mal.dialogues._histories is before
        after = generate(host, y)
    resumed = states_of(mal)
    mal.dialogues.forget()
    with mal.dialogue(ids, "A"):
        host.generate(**x, max_new_tokens=2)
        assert_identical(generate(host, y), after)
    assert_same_states(states_of(mal), resumed)


# --- training -------------------------------------------------------------------------------------


def digest(host) -> str:
    state = host.state_dict()
    return hashlib.sha256(b"".join(state[k].numpy().tobytes() for k in sorted(state))).hexdigest()


def gradients(mal: MALAdapter) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in mal.named_parameters() if p.grad is not None}
    mal.zero_grad()
    return found


@pytest.mark.parametrize("site", SITES)
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


# --- beside other tools ---------------------------------------------------------------------------


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("how", ["PeftModel before", "PeftModel after", "add_adapter"])
def test_lora_on_the_same_host(host, how):
    peft = pytest.importorskip("peft")
    x = tiny_inputs(host, [[5]])
    torch.manual_seed(4)
    if how == "PeftModel before":
        model = peft.get_peft_model(host, lora())
        expected = generate(model, x)
        mal = attached(model, trained=False, freeze=False)
    elif how == "PeftModel after":
        mal = attached(host, trained=False)
        model = peft.get_peft_model(host, lora())
        with mal.disable_adapter():
            expected = generate(model, x)
    else:
        host.add_adapter(lora())
        model, expected = host, generate(host, x)
        mal = attached(host, trained=False, freeze=False)
    with mal.dialogue("a") as dialogue:
        assert_identical(generate(model, x), expected)
        torch.nn.init.normal_(mal.memory.to_out.weight, std=0.5)
        y = tiny_inputs(host, [[4]], seed=1)
        model(**y, labels=y["input_ids"]).loss.backward()
        assert dialogue.turns == [2]
    with_memory = model(**x).logits
    if how != "add_adapter":
        with model.disable_adapter():
            without_lora = model(**x).logits
        assert not torch.equal(with_memory, without_lora)
        with mal.disable_adapter():
            assert not torch.equal(with_memory, model(**x).logits)
    # both learn
    assert mal.memory.to_out.weight.grad.any()
    learned = [p for n, p in model.named_parameters() if "lora_" in n and p.grad is not None]
    assert any(p.grad.any() for p in learned)
    mal.detach()
    assert_identical(generate(model, x), expected)


def test_hooks_add_no_graph_break_and_no_recompilation_to_decoding(host):
    x = tiny_inputs(host, [[5], [3]])

    def compiled_turn(count: list[int]) -> torch.Tensor:
        """Prefill in eager mode, then one compiled decode step on a static cache."""
        cache = StaticCache(config=host.config.text_config, max_cache_len=32)
        out = host(**x, past_key_values=cache, use_cache=True)
        length = x["input_ids"].shape[1]
        mask = torch.cat([x["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        return step(
            input_ids=out.logits[:, -1:].argmax(-1),
            attention_mask=mask,
            past_key_values=cache,
            position_ids=mask.sum(1, keepdim=True) - 1,
            cache_position=torch.tensor([length]),
        ).logits

    graphs: list[int] = []

    def backend(module, _inputs):
        graphs.append(1)
        return module.forward

    mal = attached(host)
    with torch.no_grad(), mal.dialogue(["a", "b"]):
        step = torch.compile(host, backend=backend, fullgraph=True)  # a graph break raises
        first = compiled_turn(graphs)
        mal.undo()
        assert len(graphs) == 1
        assert torch.equal(compiled_turn(graphs), first)
        assert mal.last_turn is not None
        assert len(graphs) == 1
        mal.undo()
        step = host
        torch.testing.assert_close(compiled_turn(graphs), first, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


# --- bad input ------------------------------------------------------------------------------------


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
        hosts._SPECS, "qwen2_audio", hosts.HostSpec("qwen2_audio", min_clip_tokens=1)
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
    monkeypatch.setitem(hosts._SPECS, "qwen2_audio", spec)
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


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(host, tmp_path):
    mal = attached(host, 1, lr_init=(0.1, 0.2))
    x = tiny_inputs(host, [[5, 3]])
    expected = host(**x).logits
    mal.save_pretrained(tmp_path / "mal")
    mal.detach()
    files = {path.name for path in (tmp_path / "mal").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    loaded = MALAdapter.from_pretrained(tmp_path / "mal")
    assert loaded.config == mal.config
    assert loaded.config.lr_init == (0.1, 0.2)
    loaded.attach(host)
    assert torch.equal(host(**x).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.detach()
    trainable = MALAdapter.from_pretrained(str(tmp_path / "mal"), is_trainable=True)
    assert all(p.requires_grad for p in trainable.parameters())


def test_saving_needs_weights(tmp_path):
    with pytest.raises(ArgumentError, match=r"hidden_size is None.*attach"):
        MALAdapter(CONFIG).save_pretrained(tmp_path / "mal")
    assert not (tmp_path / "mal").exists()


def test_model_card_names_the_base_model(host, tmp_path):
    host.config._name_or_path = "some/host"
    MALAdapter(CONFIG).attach(host).save_pretrained(tmp_path)
    card = pytest.importorskip("huggingface_hub").ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mal_kernels"
    assert card.data.base_model == "some/host"
    assert card.data.base_model_relation == "adapter"


def test_what_is_pushed_to_the_hub_can_be_loaded_from_it(host, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    done = {}

    class Api:
        def __init__(self, token):
            done["token"] = token

        def create_repo(self, repo_id, **options):
            done["repo"] = repo_id, options

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name, **_: tmp_path / repo / name)
    mal = attached(host)
    assert mal.push_to_hub("me/mal", private=True, token="t") == "https://hub/me/mal"
    assert done == {"token": "t", "repo": ("me/mal", {"private": True, "exist_ok": True})}
    files = sorted(path.name for path in (tmp_path / "me" / "mal").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    x = tiny_inputs(host, [[5]])
    expected = host(**x).logits
    mal.detach()
    MALAdapter.from_pretrained("me/mal").attach(host)
    assert torch.equal(host(**x).logits, expected)


def test_print_trainable_parameters(host, capsys):
    mal = MALAdapter(CONFIG)
    mal.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 0 || all params: 0")
    mal.attach(host).print_trainable_parameters()
    mine = sum(p.numel() for p in mal.parameters())
    every = mine + sum(p.numel() for p in host.parameters())
    assert capsys.readouterr().out.split(" || ")[:2] == [
        f"trainable params: {mine:,d}",
        f"all params: {every:,d}",
    ]


@pytest.fixture
def folder(tmp_path):
    MALAdapter(MALConfig(heads=2, head_dim=8, hidden_size=32)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "is a JSON list; expected an object"),
        ("{", "is not JSON"),
        ('{"peft_type": "LORA", "r": 8}', r"written by .*None.*library that wrote it"),
        ({"version": 2}, r"\('mal_kernels', 2\)"),
        ({"rank": 8, "alpha": 1}, r"unknown keys \['alpha', 'rank'\]"),
        ({"heads": "two"}, r"not valid: MALConfig.heads is 'two'"),
        ({"hidden_size": None}, r"hidden_size is null"),
        ({"heads": 4}, r"memory.to_rates.bias is float32 \[6\], expected float32 \[12\]"),
        ({"residual_norm": True}, r"memory.init.2 is missing"),
    ],
)
def test_bad_adapter_config(folder, text, match):
    path = folder / "adapter_config.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=match):
        MALAdapter.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 50, -4])
def test_truncated_adapter(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cannot read .*adapter_model.safetensors"):
        MALAdapter.from_pretrained(folder)


def test_foreign_or_missing_adapters(folder, tmp_path):
    mal = MALAdapter.from_pretrained(folder)
    mal.dialogues.save(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not 'adapter' written by"):
        MALAdapter.from_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*adapter_config.json"):
        MALAdapter.from_pretrained(folder)
    for missing in ("nobody/nothing", "not//a repository", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="is not a folder, and not a repository"):
            MALAdapter.from_pretrained(missing)


RESUME = """
import sys
from mal_kernels import MALAdapter
from mal_kernels.testing import tiny_host, tiny_inputs

folder = sys.argv[1]
host = tiny_host("qwen2_audio")
mal = MALAdapter.from_pretrained(folder).attach(host)
mal.dialogues.load(folder + "/calls.safetensors")
with mal.dialogue(["a", "b"], ["A", None]):
    ids = host.generate(**tiny_inputs(host, [[5], [3]], seed=2), max_new_tokens=4)
mal.dialogues.save(folder + "/resumed.safetensors")
print(ids.tolist())
"""


def test_interrupted_and_resumed_is_uninterrupted(host, tmp_path):
    mal = attached(host, site=1)
    turns = [tiny_inputs(host, [[5], [3]], seed=i) for i in range(3)]
    with mal.dialogue(["a", "b"], ["A", None]):
        for x in turns[:2]:
            host.generate(**x, max_new_tokens=2)
        mal.save_pretrained(tmp_path)
        mal.dialogues.save(tmp_path / "calls.safetensors")
        ids = host.generate(**turns[2], max_new_tokens=4)
    mal.dialogues.save(tmp_path / "uninterrupted.safetensors")
    mal.detach()
    command = [sys.executable, "-c", RESUME, str(tmp_path)]
    # another number of threads adds in another order
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    resumed = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    assert json.loads(resumed.splitlines()[-1]) == ids.tolist()
    whole, parts = (
        (tmp_path / f"{name}.safetensors").read_bytes() for name in ("uninterrupted", "resumed")
    )
    assert whole == parts
