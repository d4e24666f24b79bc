import numpy as np
import pytest

from mal_kernels.demo import synth


def pitch_of(wave: np.ndarray) -> float:
    """Mean fundamental in semitones, by autocorrelation of 64 ms frames."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 1024)[::512] * np.hanning(1024)
    power = np.abs(np.fft.rfft(frames, 4096)) ** 2
    lags = (
        np.fft.irfft(power)[:, :400]
        / np.fft.irfft(np.abs(np.fft.rfft(np.hanning(1024), 4096)) ** 2)[:400]
    )
    lag = 40 + np.argmax(lags[:, 40:], axis=1)  # up to 400 Hz
    return float(np.median(12 * np.log2(synth.SAMPLE_RATE / lag / synth.REFERENCE_HZ)))


@pytest.mark.parametrize("pitch", [-6.0, 0.0, 7.0])
@pytest.mark.parametrize("timbre", [-0.2, 0.2])
def test_an_utterance_has_the_pitch_of_the_script(pitch, timbre):
    rng = np.random.default_rng(0)
    heard = np.median([pitch_of(synth.render(rng, pitch, timbre)) for _ in range(5)])
    assert abs(heard - pitch) < 0.5


def test_sound_is_audible_bounded_and_reproducible():
    script = synth.sample(np.random.default_rng(1), dialogues=2, turns=3)
    waves = synth.render_script(np.random.default_rng(2), script)
    assert waves.shape == (2, 3, synth.CLIP_SAMPLES)
    assert waves.dtype == np.float32
    level = np.sqrt(np.mean(waves**2, axis=-1))
    assert (level > 0.02).all()
    assert np.abs(waves).max() <= 1
    np.testing.assert_array_equal(waves, synth.render_script(np.random.default_rng(2), script))


def test_scripts_have_the_stated_distribution():
    script = synth.sample(np.random.default_rng(3), dialogues=4000)
    assert np.abs(np.bincount(script.label.ravel()) / script.label.size - 1 / 3).max() < 0.01
    assert np.diff(script.timbre, axis=1).__abs__().min() > synth.TIMBRE_GAP
    expected = synth.BASELINE_SD**2 + synth.PITCH_SD**2 + (2 / 3) * synth.SHIFT**2
    assert abs(script.pitch.var() / expected - 1) < 0.03
    # labels tell nothing about the next label, speakers hold the floor three times in ten
    same_label = script.label[:, 1:] == script.label[:, :-1]
    same_speaker = script.speaker[:, 1:] == script.speaker[:, :-1]
    assert abs(same_label.mean() - 1 / 3) < 0.01
    assert abs(same_speaker.mean() - 0.3) < 0.01


def test_history_counts_earlier_turns_of_the_same_speaker():
    speaker = np.array([[0, 1, 1, 0, 1]])
    script = synth.Script(speaker, speaker, speaker.astype(float), np.zeros((1, 2)))
    assert script.history().tolist() == [[0, 0, 1, 1, 2]]


def test_single_cap_is_the_integral():
    script = synth.sample(np.random.default_rng(4), dialogues=4000)
    right = synth.single_cap(script) == script.label
    assert abs(right.mean() - synth.single_cap_accuracy()) < 4 * np.sqrt(0.25 / script.label.size)


def brute_force(pitch: list[float]) -> int:
    """The last label of one speaker's turns, by summing over all labels and baselines."""
    baselines = np.linspace(-20, 20, 4001)
    belief = np.exp(-0.5 * (baselines / synth.BASELINE_SD) ** 2)
    for i, x in enumerate(pitch):
        error = (x - baselines[:, None] - synth.OFFSETS) / synth.PITCH_SD
        likelihood = np.exp(-0.5 * error**2)
        if i == len(pitch) - 1:
            return int((belief[:, None] * likelihood).sum(0).argmax())
        belief = belief * likelihood.sum(1)
    raise AssertionError


def test_context_cap_is_the_bayes_rule_per_speaker():
    script = synth.sample(np.random.default_rng(5), dialogues=12, turns=8)
    guess = synth.context_cap(script)
    for n in range(len(script)):
        for t in range(8):
            own = script.speaker[n, : t + 1] == script.speaker[n, t]
            assert guess[n, t] == brute_force(script.pitch[n, : t + 1][own].tolist())


def test_caps_bracket_the_task():
    script = synth.sample(np.random.default_rng(6), dialogues=400)
    context = synth.context_cap(script) == script.label
    single = synth.single_cap(script) == script.label
    first = script.history() == 0
    np.testing.assert_array_equal(context[first], single[first])  # no history, no advantage
    assert context.mean() > 0.78
    assert context[script.history() >= 7].mean() > 0.92


def test_cat_keeps_the_order():
    rng = np.random.default_rng(7)
    parts = [synth.sample(rng, 2, turns=3), synth.sample(rng, 3, turns=3)]
    whole = synth.Script.cat(parts)
    assert len(whole) == 5
    np.testing.assert_array_equal(whole.pitch[2:], parts[1].pitch)
