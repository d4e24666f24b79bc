import io

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console

from mal_kernels import MALAdapter
from mal_kernels.demo import audio, data, figure, play, show, small_host, synth, train
from mal_kernels.errors import ArgumentError, AudioFileError, CheckpointError


@pytest.fixture(autouse=True)
def _one_thread():
    with show.one_thread():  # as the demo runs
        yield


@pytest.fixture(scope="module")
def shipped():
    host, mal = train.load()
    return play.Player(host, mal.attach(host), small_host.build_processor())


# --- the weights that ship with the package -------------------------------------------------------


def test_shipped_weights_are_small():
    assert sum(file.stat().st_size for file in train.WEIGHTS.iterdir()) < 2**20


def test_memory_beats_what_one_utterance_can_tell(shipped):
    result = play.evaluate(shipped, dialogues=100, seed=99)
    scores = {way: score.accuracy for way, score in result.scores.items()}
    single = scores["single-utterance cap"]
    assert result.gain > 0.10
    assert scores["memory"] < scores["context cap"]
    assert abs(scores["no memory"] - single) < 0.04  # four standard errors of the difference
    assert scores["memory, reset"] == scores["no memory"]  # an empty memory reads exactly zero
    memory = result.scores["memory"].by_history
    assert memory[0] < single + 0.1
    assert memory[-1] > memory[0] + 0.15


def test_without_history_memory_does_not_matter(shipped):
    result = play.evaluate(shipped, dialogues=10, seed=3, turns=3)
    assert result.scores["memory"].by_history[0] == result.scores["memory, reset"].by_history[0]


def test_timing_a_turn_again_does_not_write_it_again(shipped):
    rng = np.random.default_rng(0)
    waves = synth.render_script(rng, synth.sample(rng, dialogues=2, turns=4))
    once, often = (list(shipped.turns(waves, ["ABAA", "ABBA"], timings)) for timings in (1, 3))
    for a, b in zip(once, often, strict=True):
        np.testing.assert_array_equal(a.surprise, b.surprise)
        np.testing.assert_array_equal(a.with_memory, b.with_memory)
    assert len(shipped.mal.dialogues) == 0  # and nothing is kept


# --- training -------------------------------------------------------------------------------------


def answer_logits(host, mels):
    """What the host answers to the emotion prompt, ``[rows, V]``, called as a user calls it."""
    ids = small_host.token_ids(len(mels))
    frames = torch.ones(len(mels), small_host.FRAMES, dtype=torch.long)
    return host(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        input_features=mels,
        feature_attention_mask=frames,
    ).logits[:, -1]


def test_training_path_and_adapter_agree():
    """The loop over turns in train.py is the adapter's hooks, with gradients through all turns."""
    host = small_host.build_host(seed=1).requires_grad_(False)
    mal = MALAdapter(train.adapter_config())
    torch.nn.init.normal_(mal.memory.to_out.weight, std=0.3)
    rng = np.random.default_rng(0)
    script = synth.sample(rng, dialogues=3, turns=5)
    mels = torch.randn(3, 5, small_host.MELS, small_host.FRAMES)
    mal.attach(host)
    fast = train.answer_logits(
        host,
        train.remember(mal.memory, train.embed(host, mels), torch.from_numpy(script.speaker)),
    )
    slow = []
    for t, speakers in enumerate(zip(*play.names(script), strict=True)):
        with mal.dialogue(["a", "b", "c"], speaker=list(speakers)):
            slow.append(answer_logits(host, mels[:, t]))
    slow = torch.stack(slow, 1)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    last = mal.memory.to_k.weight  # only what earlier turns wrote depends on keys
    (by_fast,) = torch.autograd.grad(fast[:, -1].square().sum(), last)
    (by_slow,) = torch.autograd.grad(slow[:, -1].square().sum(), last)
    assert by_slow.abs().max() > 0
    torch.testing.assert_close(by_fast, by_slow, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_short_training_makes_both_host_and_memory_learn(tmp_path):
    recipe = train.Recipe(dialogues=100, host_steps=160, memory_steps=40)
    host, mal = train.train(recipe, workers=1)
    train.save(host, mal, tmp_path)
    host, mal = train.load(tmp_path)
    player = play.Player(host, mal.attach(host), small_host.build_processor())
    result = play.evaluate(player, dialogues=40, seed=7)
    scores = {way: score.accuracy for way, score in result.scores.items()}
    assert scores["no memory"] > scores["single-utterance cap"] - 0.06
    assert result.gain > 0.05
    assert scores["memory"] > scores["memory, reset"] + 0.05


def test_dialogues_do_not_depend_on_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 2)
    one, two = (data.make_dialogues(5, count=5, workers=workers) for workers in (1, 2))
    np.testing.assert_array_equal(one.script.pitch, two.script.pitch)
    assert torch.equal(one.features, two.features)


def test_features_of_training_are_those_of_the_processor():
    dialogues = data.make_dialogues(6, count=1, workers=1)
    seed = np.random.SeedSequence(6).spawn(1)[0]
    rng = np.random.default_rng(seed)
    waves = synth.render_script(rng, synth.sample(rng, 1))[0]
    inputs = small_host.prompt(small_host.build_processor(), waves)
    assert torch.equal(inputs["input_ids"], small_host.token_ids(len(waves)))
    assert inputs["feature_attention_mask"].all()
    torch.testing.assert_close(
        inputs["input_features"], dialogues.features[0].float(), rtol=0, atol=2e-3
    )


def test_missing_weights_say_how_to_make_them(tmp_path):
    with pytest.raises(CheckpointError, match=r"mal-kernels demo --train --out"):
        train.load(tmp_path)


# --- recordings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 3)])
def test_recordings_of_any_rate_and_channels(tmp_path, rate, channels):
    t = np.arange(rate) / rate
    tone = np.where((t > 0.2) & (t < 0.95), np.sin(2 * np.pi * 200 * t), 0)
    path = tmp_path / "tone.wav"
    soundfile.write(path, np.stack([tone] * channels, axis=1), rate)
    clip = audio.load_turn(path)
    assert clip.shape == (synth.CLIP_SAMPLES,)
    assert clip.dtype == np.float32
    assert np.abs(np.fft.rfft(clip * np.hanning(len(clip)))).argmax() == 128  # 200 Hz in 0.64 s
    assert np.sqrt(np.mean(clip**2)) == pytest.approx(audio.LOUDNESS, rel=1e-3)


def test_short_recording_is_padded(tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 800), 16_000)
    clip = audio.load_turn(path)
    assert clip.shape == (synth.CLIP_SAMPLES,)
    assert not clip[800:].any()


def write_text(path):
    path.write_text("not audio")


def write_empty(path):
    soundfile.write(path, np.zeros((0, 1)), 16_000)


def write_silence(path):
    soundfile.write(path, np.zeros((20_000, 1)), 16_000)


def write_nan(path):
    soundfile.write(path, np.full((20_000, 1), np.nan), 16_000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("write", "remedy"),
    [
        (lambda path: None, "no such file"),
        (write_text, "ffmpeg -i turn.wav"),
        (write_empty, "no samples"),
        (write_silence, "silent"),
        (write_nan, "not finite"),
    ],
)
def test_bad_recordings_are_named_with_a_remedy(tmp_path, write, remedy):
    path = tmp_path / "turn.wav"
    write(path)
    with pytest.raises(AudioFileError, match=remedy) as caught:
        audio.load_turn(path)
    assert "turn.wav" in str(caught.value)


# --- what is shown --------------------------------------------------------------------------------


def test_demo_shows_table_scores_and_figure(tmp_path):
    console = Console(file=io.StringIO(), width=120)
    result = show.run(console, dialogues=4, out=tmp_path)
    assert set(figure.STYLES) <= set(result.scores)
    assert (tmp_path / show.FIGURE).read_bytes().startswith(b"\x89PNG")
    text = console.file.getvalue()
    for expected in ("with memory", "truth", "surprise", "MAL ms", "context cap", "demo.png"):
        assert expected in text


def test_demo_plays_recordings(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.wav" for name in ("hello", "world")]
    for path, pitch in zip(paths, (-4.0, 4.0), strict=True):
        soundfile.write(path, synth.render(rng, pitch, 0.0), synth.SAMPLE_RATE)
    console = Console(file=io.StringIO(), width=120)
    assert show.run(console, paths, speakers="AB", out=tmp_path) is None
    assert "hello.wav" in (text := console.file.getvalue())
    assert "truth" not in text
    with pytest.raises(ArgumentError, match="ABAB"):
        show.run(console, paths, speakers="A")


def test_verdict_can_say_no():
    script = synth.sample(np.random.default_rng(0), dialogues=50)
    cap = play.score(script, synth.single_cap(script))
    best = play.score(script, synth.context_cap(script))
    scores = {"no memory": cap, "memory": cap, "single-utterance cap": cap, "context cap": best}
    surprise = np.ones(script.label.shape)
    assert "no sign" in play.verdict(play.Evaluation(scores, surprise))
    assert "no sign" not in play.verdict(play.Evaluation({**scores, "memory": best}, surprise))
