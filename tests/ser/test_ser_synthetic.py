"""Synthetic corpora: what they promise, and their exact caps."""

import itertools

import numpy as np
import pytest

from mal_kernels.demo import synth
from mal_kernels.ser.corpora import CorpusError, read_audio, synthetic


@pytest.mark.parametrize("variant", synthetic.VARIANTS)
def test_one_utterance_is_worth_the_same_in_every_variant(variant):
    said = synthetic.script(variant, "test", 3000)
    assert abs((synth.single_cap(said) == said.label).mean() - synth.single_cap_accuracy()) < 0.02
    assert np.abs(np.bincount(said.label.ravel()) / said.label.size - 1 / 3).max() < 0.02
    last_turn = said.pitch[:, -1]
    expected = synth.BASELINE_SD**2 + synth.PITCH_SD**2 + (2 / 3) * synth.SHIFT**2
    assert abs(last_turn.var() / expected - 1) < 0.12  # both chains are stationary


def same_speaker_pairs(said, values):
    """``values`` of consecutive turns of the same speaker."""
    pairs = []
    for n in range(len(said)):
        for s in (0, 1):
            own = values[n, said.speaker[n] == s]
            pairs += itertools.pairwise(own)
    return np.array(pairs).T


@pytest.mark.parametrize("variant", synthetic.VARIANTS)
def test_chains_have_the_stated_persistence(variant):
    process, said = synthetic.VARIANTS[variant], synthetic.script(variant, "train", 1000)
    before, after = same_speaker_pairs(said, said.label)
    assert abs((before == after).mean() - process.stickiness) < 0.02
    baseline = said.pitch - synth.OFFSETS[said.label]
    before, after = same_speaker_pairs(said, baseline)
    share = synth.BASELINE_SD**2 / (synth.BASELINE_SD**2 + synth.PITCH_SD**2)
    assert abs(np.corrcoef(before, after)[0, 1] - share * process.persistence) < 0.03


def test_the_cap_is_that_of_the_demo_where_the_baseline_is_fixed():
    said = synthetic.script("baseline", "test", 60)
    mine = synthetic.context_cap(said, synthetic.VARIANTS["baseline"])
    assert (mine == synth.context_cap(said)).mean() > 0.995


def test_the_cap_of_the_trap_is_that_of_one_turn():
    said = synthetic.script("trap", "test", 60)
    guess = synthetic.context_cap(said, synthetic.VARIANTS["trap"])
    np.testing.assert_array_equal(guess, synth.single_cap(said))


@pytest.mark.parametrize("variant", ["drift", "inertia"])
def test_the_cap_uses_the_process(variant):
    """The rule of the right process beats that of a fixed baseline and independent labels."""
    said = synthetic.script(variant, "test", 400)
    right = synthetic.context_cap(said, synthetic.VARIANTS[variant]) == said.label
    blind = synthetic.context_cap(said, synthetic.VARIANTS["baseline"]) == said.label
    alone = synth.single_cap(said) == said.label
    assert right.mean() > max(blind.mean(), alone.mean())


def brute_force(pitch, process):
    """Posterior guess for the last turn: a sum over a coarse grid of baselines and all labels."""
    grid = np.linspace(-16, 16, 161)
    belief = np.exp(-0.5 * (grid / synth.BASELINE_SD) ** 2)[:, None] * np.ones(3)
    rho = process.persistence
    step = grid - rho * grid[:, None]
    move = np.exp(-0.5 * step**2 / (synth.BASELINE_SD**2 * (1 - rho**2)))
    move /= move.sum(1, keepdims=True)
    for i, x in enumerate(pitch):
        if i:
            belief = np.einsum("gc,gh,cd->hd", belief, move, process.label_transition)
        belief = belief * np.exp(-0.5 * ((x - grid[:, None] - synth.OFFSETS) / synth.PITCH_SD) ** 2)
    return int(belief.sum(0).argmax())


def test_the_cap_is_the_bayes_rule():
    process = synthetic.Process(persistence=0.9, stickiness=0.6)
    said = synthetic.script("drift", "test", 8)
    guess = synthetic.context_cap(said, process)
    agree = [
        guess[n, t]
        == brute_force(
            said.pitch[n, : t + 1][said.speaker[n, : t + 1] == said.speaker[n, t]], process
        )
        for n in range(8)
        for t in range(0, 16, 3)
    ]
    assert np.mean(agree) > 0.95  # grids differ


def test_sound_is_the_same_every_time_and_splits_differ():
    corpus = synthetic.build("drift", {"train": 2, "test": 2})
    again = synthetic.build("drift", {"train": 2, "test": 2})
    turn = corpus.dialogues[0].turns[3]
    wave = read_audio(turn)
    assert wave.shape == (synth.CLIP_SAMPLES,)
    np.testing.assert_array_equal(wave, read_audio(again.dialogues[0].turns[3]))
    assert turn.audio.seed != corpus.dialogues[2].turns[3].audio.seed
    assert {t.speaker for t in corpus.dialogues[0].turns} <= {"A", "B"}
    with pytest.raises(CorpusError, match="the variants are"):
        synthetic.script("quiet", "test", 1)
