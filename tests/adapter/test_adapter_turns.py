"""A call of the host is one turn: read first, written once, in any decoding and batch."""

from __future__ import annotations

import pytest
import torch

from mal_kernels.errors import ArgumentError, HostError
from mal_kernels.store import DirectoryStore
from mal_kernels.testing import cache_name, tiny_inputs
from tests.support.adapters import (
    DECODING,
    SITES,
    assert_same_states,
    attached,
    row_alone,
    states_of,
)


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
        name = cache_name(host)
        cache = getattr(host(**first, use_cache=True), name)
        out = host.generate(
            **{**second, "input_ids": both["input_ids"], "attention_mask": both["attention_mask"]},
            **{name: cache},
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


# --- which turn is it -----------------------------------------------------------------------------


def test_a_named_turn_is_written_once_whatever_comes_between(host):
    mal = attached(host)
    first, second = (tiny_inputs(host, [[5, 3]], seed=seed) for seed in range(2))
    with mal.dialogue("a"):
        host(**tiny_inputs(host, [[4]], seed=9))
    with mal.dialogue("a", "A", turn_id="one") as call:
        answer = host(**first).logits
        assert mal.last_turn.resent == [0]
    with mal.dialogue("a", "B", turn_id="two"):
        host(**second)
    held = mal.dialogues.latest("a")
    assert call.turns == [5]
    with mal.dialogue("a", "A", turn_id="one"):
        assert torch.equal(host(**first).logits, answer)  # it reads what the first one read
        assert mal.last_turn.resent == [2]
        assert mal.last_turn.tokens == [0]
        host.generate(**first, max_new_tokens=2)
    assert mal.dialogues.latest("a") is held
    call.undo()
    with mal.dialogue("a", turn_id="two"):
        host(**second)  # that turn was taken back
    assert call.turns == [5]


def test_a_name_that_is_new_is_a_new_turn_whatever_it_sounds_like(host):
    mal = attached(host)
    x = tiny_inputs(host, [[5]])
    for n, name in enumerate(("one", "two", "two", None), 1):
        with mal.dialogue("a", turn_id=name) as call:
            host(**x)
        assert call.turns == [min(n, 2)]
    first, second, both = two_turns(host)
    with mal.dialogue("b", turn_id="one"):
        host(**first)
    with mal.dialogue("b", turn_id="two") as call:
        host(**both)  # the context is known as ever
        assert mal.last_turn.resent == [1]
    assert call.turns == [2]
    assert second["input_features"].shape[0] == 1


def test_each_row_of_a_batch_may_have_its_name(host):
    mal = attached(host)
    x, y = (tiny_inputs(host, [[5], [3]], seed=seed) for seed in range(2))
    with mal.dialogue(["a", "b"], turn_id=["one", None]):
        host(**x)
    held = mal.dialogues.latest("a")
    with mal.dialogue(["a", "b"], turn_id=["one", "two"]) as call:
        host(**y)
        assert mal.last_turn.resent == [1, 0]
    assert call.turns == [1, 2]
    assert mal.dialogues.latest("a") is held
    mal.detach()
    alone = attached(host)
    for inputs in (x, y):
        with alone.dialogue("b"):
            host(**row_alone(inputs, 1))
    b = {0: mal.dialogues.latest("b").states[None]}
    assert_same_states(b, {0: alone.dialogues.latest("b").states[None]}, rtol=1e-4, atol=1e-5)


def test_names_are_known_in_another_process(host, tmp_path):
    x, y = (tiny_inputs(host, [[5]], seed=seed) for seed in range(2))
    for _ in range(2):
        mal = attached(host)  # the same weights
        mal.dialogues.backing = DirectoryStore(tmp_path)
        for name, inputs in (("one", x), ("two", y)):
            with mal.dialogue("a", turn_id=name) as call:
                host(**inputs)
        with mal.dialogue("a"):
            host(**y)  # and so are clips
        assert call.turns == [2]
        mal.detach()


@pytest.mark.parametrize("bad", [7, ["one"], ["one", 2]])
def test_names_that_are_none_are_refused(host, bad):
    mal = attached(host)
    with (
        pytest.raises(ArgumentError, match=r"turn_id is .* for 2 dialogues; pass a string"),
        mal.dialogue(["a", "b"], turn_id=bad),
    ):
        pass


def test_a_clip_that_was_recognised_is_said_and_may_be_remembered_again(host, caplog):
    mal = attached(host)
    x = tiny_inputs(host, [[5]])
    with caplog.at_level("INFO", logger="mal_kernels"):
        with mal.dialogue("a"):
            host(**x)
        assert caplog.messages == []
        with mal.dialogue("a"):
            host(**x)
        assert mal.last_turn.resent == [1]
        assert caplog.messages == ["1 clips were sent again and are not written to dialogues ['a']"]
        with mal.dialogue("a", remember_again=True) as call:
            host(**x)
        assert mal.last_turn.resent == [0]
    assert call.turns == [2]
    assert len(caplog.messages) == 1


def test_dialogues_saved_by_an_older_version_load_and_their_clips_are_new(host):
    mal = attached(host)
    x = tiny_inputs(host, [[5]])
    with mal.dialogue("a"):
        host(**x)
    held = mal.dialogues.latest("a")
    old = held._replace(clips=(-2996025758654136320,))  # a fingerprint of another kind
    mal.dialogues.commit({"a": old}, {"a": held})
    with mal.dialogue("a") as call:
        host(**x)
        host(**x)
    assert call.turns == [2]
