"""The model over windows, the memories, and the controls: every shortcut against the definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mal_kernels.errors import ArgumentError
from mal_kernels.ser import controls
from mal_kernels.ser.corpora import Corpus, Dialogue, Turn, synthetic
from mal_kernels.ser.cost import cost
from mal_kernels.ser.host import (
    EncodedDialogue,
    EncodedTurn,
    Listener,
    encode_corpus,
    load_listener,
)
from mal_kernels.ser.memories import ARMS, NEVER
from mal_kernels.ser.model import collate, new_model
from mal_kernels.ser.scoring import generate, index_turns, score_dialogues, score_host
from mal_kernels.ser.stream import play

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft
MEMORIES = [name for name, arm in ARMS.items() if arm.kind not in ("lora", "prompt")]


@pytest.fixture(scope="module")
def corpus():
    return synthetic.build("baseline", {"test": 4})


@pytest.fixture(scope="module")
def encoded(corpus):
    return encode_corpus(load_listener("demo", corpus.labels), corpus)


@pytest.fixture(scope="module")
def ragged(encoded):
    """Dialogues of 7, 1 and 16 turns, prompts and clips of several lengths, a silent turn."""
    dialogues = []
    for d, (dialogue, length) in enumerate(zip(encoded, (7, 1, 16), strict=False)):
        turns = []
        for t, turn in enumerate(dialogue.turns[:length]):
            keep = torch.ones(len(turn.audio), dtype=torch.bool)
            keep[1 : 1 + (t + d) % 4] = False  # a shorter clip
            audio = turn.audio[keep] & (t != 2)
            turns.append(EncodedTurn(turn.embeds[keep], audio))
        label = [-100 if t == 2 else x for t, x in enumerate(dialogue.label[:length])]
        speaker = dialogue.speaker[:length]
        dialogues.append(EncodedDialogue(dialogue.dialogue, tuple(turns), speaker, tuple(label)))
    return dialogues


def make(name, corpus, **options):
    """A model whose memory has an effect: the output projection of a new one is zero."""
    model = new_model(load_listener("demo", corpus.labels), ARMS[name], head_dim=8, **options)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "to_out" in parameter_name or "lora_B" in parameter_name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def window_of(dialogues):
    turns = max(len(d.turns) for d in dialogues)
    return collate([(d, 0, len(d.turns)) for d in dialogues], turns)


@torch.no_grad()
def scores_of(model, dialogues):
    return model(**window_of(dialogues).as_dict())["scores"]


@pytest.mark.parametrize("name", ARMS)
def test_a_new_arm_answers_as_the_host(name, corpus, encoded):
    if name == "prompt":
        pytest.skip("its prompt is another one")
    alone = score_host(load_listener("demo", corpus.labels), encoded)
    model = new_model(load_listener("demo", corpus.labels), ARMS[name], head_dim=8)
    new = score_dialogues(model, encoded)
    np.testing.assert_allclose(new.probabilities, alone.probabilities, atol=1e-7)


@pytest.mark.parametrize("name", ["gated", "gated-speaker", "mlp-speaker"])
@pytest.mark.parametrize("kind", ["even", "ragged"])
def test_a_window_equals_the_hooks_turn_by_turn(name, kind, corpus, encoded, ragged):
    dialogues = encoded[:2] if kind == "even" else ragged
    model = make(name, corpus)
    found = scores_of(model, dialogues)
    expected = iter(list(play(model, dialogues)))
    for b, dialogue in enumerate(dialogues):
        for t, heard in enumerate(dialogue.heard):
            if heard:
                torch.testing.assert_close(found[b, t], next(expected), atol=2e-5, rtol=1e-5)
    assert next(expected, None) is None


@pytest.mark.parametrize("name", [n for n in MEMORIES if n != "attention"])
def test_windows_with_carried_state_equal_the_whole(name, corpus, ragged):
    model = make(name, corpus)
    whole = scores_of(model, ragged)
    model.keeps_state = True
    parts = []
    with torch.no_grad():
        for start in range(0, 16, 5):
            rows = [
                (d if start < len(d.turns) else None, start, min(start + 5, len(d.turns)))
                for d in ragged
            ]
            parts.append(model(**collate(rows, 5).as_dict())["scores"])
    cut = torch.cat(parts, 1)[:, :16]
    torch.testing.assert_close(cut, whole, atol=2e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_batch_equals_each_alone_and_the_past_does_not_know_the_future(name, corpus, ragged):
    model = make(name, corpus)
    together = scores_of(model, ragged)
    for b, dialogue in enumerate(ragged):
        alone = scores_of(model, [dialogue])[0]
        length = len(dialogue.turns)
        torch.testing.assert_close(
            together[b, :length], alone, atol=2e-5, rtol=1e-5, equal_nan=True
        )
    long = ragged[2]
    cut = EncodedDialogue(long.dialogue, long.turns[:9], long.speaker[:9], long.label[:9])
    torch.testing.assert_close(
        scores_of(model, [cut])[0], together[2, :9], atol=2e-5, rtol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("name", ["gated-speaker", "mlp"])
def test_gradients_of_the_fast_path_are_those_of_the_turn_loop(name, corpus, encoded):
    gradients = []
    for keeps_state in (False, True):  # True takes the loop over turns
        model = make(name, corpus).train()
        model.keeps_state = keeps_state
        model(**window_of(encoded[:2]).as_dict())["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all("memory" in key for key in gradients[0])  # the host stays frozen
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], atol=1e-6, rtol=1e-4)


def test_frozen_gates_stay_at_zero(corpus, encoded):
    model = make("infini", corpus).train()
    model(**window_of(encoded[:2]).as_dict())["loss"].backward()
    memory, heads = model.memory.memory, model.memory.memory.heads
    assert memory.to_rates.weight.grad[:heads].abs().sum() > 0
    assert not memory.to_rates.weight.grad[heads:].any()
    assert not memory.to_rates.bias.grad[heads:].any()
    tokens = encoded[0].turns[0].embeds
    _, momentum, decay = memory.rates(tokens, torch.tensor([0, len(tokens)]))
    torch.testing.assert_close(momentum, torch.full_like(momentum, NEVER))
    torch.testing.assert_close(decay, torch.full_like(decay, NEVER))


def test_lora_is_as_large_as_the_memory(corpus):
    memory, lora = make("gated", corpus), make("lora", corpus)
    assert abs(lora.trained_parameters() / memory.trained_parameters() - 1) < 0.15
    assert all(".lora_" in name for name in lora.state_dict())
    both = make("gated", corpus, lora=2)
    names = both.state_dict()
    assert any(".lora_" in n for n in names)
    assert any(n.startswith("memory.") for n in names)
    with pytest.raises(ArgumentError, match="differs in"):
        both.load_state_dict(memory.state_dict())


def test_the_prompt_arm_sees_earlier_turns_only(corpus, encoded):
    model = make("prompt", corpus)
    whole = scores_of(model, encoded[:1])
    dialogue = encoded[0]
    changed = [*dialogue.turns[:-1], encoded[1].turns[0]]
    other = EncodedDialogue(dialogue.dialogue, tuple(changed), dialogue.speaker, dialogue.label)
    found = scores_of(model, [other])
    torch.testing.assert_close(found[:, :-1], whole[:, :-1])
    assert (found[:, -1] - whole[:, -1]).abs().max() > 1e-4
    first = EncodedDialogue(
        dialogue.dialogue,
        (encoded[1].turns[0], *dialogue.turns[1:]),
        dialogue.speaker,
        dialogue.label,
    )
    assert (scores_of(model, [first])[:, -1] - whole[:, -1]).abs().max() > 1e-6


def test_answers_of_several_tokens_are_scored_by_their_product(corpus, encoded):
    one = load_listener("demo", corpus.labels)
    two = Listener(one.name, one.model, one.processor, one.prompt, ((7, 8), (9,), (10, 7, 7)))
    model = new_model(two, ARMS["gated"], head_dim=8).eval()
    scores = scores_of(model, encoded[:1])[0, 0]
    rows = encoded[0].turns[0].embeds[None]
    words = one.model.get_input_embeddings()
    with torch.no_grad():
        for label, answer in enumerate(two.answers):
            total, prefix = 0.0, rows
            for token in answer:
                total += one.model(inputs_embeds=prefix).logits[0, -1].log_softmax(-1)[token]
                prefix = torch.cat([prefix, words(torch.tensor([[token]]))], 1)
            torch.testing.assert_close(scores[label], total, atol=1e-5, rtol=1e-5)


def test_written_answers_are_those_of_the_scores(corpus, encoded):
    listener = load_listener("demo", corpus.labels)
    model = make("gated-speaker", corpus)
    written = generate(model, listener, encoded[:2])
    scored = score_dialogues(model, encoded[:2]).probabilities.argmax(-1)
    assert ((written == scored) | (written == -1)).all()
    assert (written >= 0).mean() > 0.5


# --- controls -------------------------------------------------------------------------------------


def targets(dialogues, by_speaker):
    everything = [*dialogues, controls.noise_dialogue(dialogues)]
    other = controls.partners(dialogues)
    for d, t in index_turns(dialogues)[:, :2].tolist():
        rng = np.random.default_rng(0)
        yield controls.Target(everything, d, t, other[d], by_speaker, rng)


@pytest.mark.parametrize("name", ["gated", "gated-speaker", "gru", "attention", "z-norm"])
def test_the_true_history_gives_the_true_answers(name, corpus, ragged):
    model = make(name, corpus)
    histories = [target.truth() for target in targets(ragged, model.arm.by_speaker)]
    found = controls.score_histories(model, ragged, index_turns(ragged), histories)
    np.testing.assert_allclose(found, score_dialogues(model, ragged).probabilities, atol=1e-5)


def test_controls_hear_what_they_say(encoded):
    for target in targets(encoded, by_speaker=True):
        heard = {name: control.history(target) for name, control in controls.CONTROLS.items()}
        truth, here = target.truth(), encoded[target.dialogue]
        assert all(here.speaker[t] == target.speaker and t < target.turn for _, t in truth)
        assert heard["reset"] == []
        assert heard["no write"] == [x for x in truth if x[1] < controls.STOP_AFTER]
        assert {d for d, _ in heard["wrong dialogue"]} <= {target.partner}
        assert target.partner != target.dialogue
        assert len(heard["wrong dialogue"]) <= len(truth) == len(heard["noise"])
        assert {d for d, _ in heard["noise"]} <= {len(encoded)}
        assert sorted(heard["shuffled"]) == truth == heard["reversed"][::-1]
        assert all(here.speaker[t] != target.speaker for _, t in heard["swapped"])
        assert heard["swapped"] == heard["others only"]
        assert sorted([*truth, *heard["swapped"]]) == heard["merged"]
        assert heard["own only"] == truth


def test_noise_has_the_moments_of_the_sound(encoded):
    noise = controls.noise_dialogue(encoded)
    real, fake = (
        torch.cat([turn.embeds[turn.audio] for d in group for turn in d.turns])
        for group in (encoded, [noise])
    )
    assert (fake.mean(0) - real.mean(0)).abs().max() < 0.2 * real.std(0).max()
    assert abs(float(fake.std(0).mean() / real.std(0).mean()) - 1) < 0.1


@pytest.mark.parametrize("name", ["gated", "mlp-speaker"])
def test_read_off_and_reset_are_the_host_bit_for_bit(name, corpus, encoded):
    alone = score_host(load_listener("demo", corpus.labels), encoded).probabilities
    found = controls.score_controls(make(name, corpus), encoded, ["reset", "wrong dialogue"])
    for control in ("read off", "reset"):
        assert (found[control].probabilities == alone).all()
    assert not (found["wrong dialogue"].probabilities == alone).all()
    assert list(found) == ["read off", "reset", "wrong dialogue"]


def test_encoded_turns_of_another_host_are_not_taken(tmp_path, corpus):
    small = replace(corpus, dialogues=corpus.dialogues[:1])
    listener = load_listener("demo", corpus.labels)
    (before,) = encode_corpus(listener, small, tmp_path)
    for parameter in listener.model.parameters():
        parameter.data.mul_(0.5)
    (after,) = encode_corpus(listener, small, tmp_path)
    assert not torch.equal(before.turns[0].embeds, after.turns[0].embeds)
    assert len(list(tmp_path.iterdir())) == 2


def test_smoothing_is_a_running_mean_by_speaker(encoded):
    scored = score_host(load_listener("demo", ("low", "neutral", "high")), encoded[:1])
    off = controls.smoothed(scored, encoded, 0.0)
    np.testing.assert_array_equal(off, scored.probabilities)
    half, mean = controls.smoothed(scored, encoded, 0.5), {}
    for row, p, who in zip(half, scored.probabilities, encoded[0].speaker, strict=True):
        mean[who] = (mean[who] + p) / 2 if who in mean else p
        np.testing.assert_allclose(row, mean[who])
    last = controls.gold_history(encoded, scored)
    own = [t for t, who in enumerate(encoded[0].speaker) if who == encoded[0].speaker[-1]]
    assert last[-1] == encoded[0].label[own[-2]]
    assert last[0] == -1


# --- encoding and cost ----------------------------------------------------------------------------


def test_encoding_is_what_the_host_computes_and_can_be_interrupted(corpus, encoded, tmp_path):
    listener = load_listener("demo", corpus.labels)
    waves = [turn.audio() for turn in corpus.dialogues[0].turns[:2]]
    with torch.no_grad():
        expected = listener.model(**listener.inputs(waves)).logits[:, -1]
        embeds = torch.stack([turn.embeds for turn in encoded[0].turns[:2]])
        found = listener.model(inputs_embeds=embeds).logits[:, -1]
    torch.testing.assert_close(found, expected)

    def stop(turns):
        raise KeyboardInterrupt

    count = iter(range(40))
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(
            listener, corpus, tmp_path, on_turn=lambda n: stop(n) if next(count) == 20 else None
        )
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    again = encode_corpus(listener, corpus, tmp_path)
    for mine, theirs in zip(again, encoded, strict=True):
        assert mine.label == theirs.label
        assert all(
            torch.equal(a.embeds, b.embeds) and torch.equal(a.audio, b.audio)
            for a, b in zip(mine.turns, theirs.turns, strict=True)
        )


def test_turns_without_sound_keep_their_place(corpus):
    turns = (
        Turn("a", "A", corpus.dialogues[0].turns[0].audio, "low"),
        Turn("b", "B", None, "high"),
        Turn("c", "A", lambda: np.zeros(100, np.float32), "high"),
        Turn("d", None, corpus.dialogues[0].turns[1].audio, None),
    )
    small = Corpus("small", corpus.labels, (Dialogue("d", turns, "test"),))
    (dialogue,) = encode_corpus(load_listener("demo", corpus.labels), small)
    assert dialogue.heard == (True, False, False, True)
    assert dialogue.label == (0, -100, -100, -100)
    assert dialogue.speaker == (0, 1, 0, 2)


def test_cost_is_measured_through_the_adapter(corpus, encoded):
    model = make("gated-speaker", corpus)
    found = cost(model, encoded, turns=4)
    assert found["turns"] == 4
    assert found["host_ms"] > 0
    assert found["state_bytes_per_speaker"] == 2 * 4 * 8 * 8 * 4  # W and S, 4 heads of 8 x 8
    with pytest.raises(ArgumentError, match="no MALAdapter"):
        cost(make("gru", corpus), encoded)
