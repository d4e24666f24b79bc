"""Metrics against their definitions, statistics, verdicts, the report, and the command line."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from mal_kernels.ser import report, runs
from mal_kernels.ser.__main__ import app
from mal_kernels.ser.corpora.synthetic import build
from mal_kernels.ser.evaluate import Evaluation, Verdict, as_json, verdicts
from mal_kernels.ser.host import encode_corpus, load_listener
from mal_kernels.ser.metrics import by_history, calibration_error, compare, interval, summary
from mal_kernels.ser.scoring import Scored, as_scored, index_turns
from tests.support.corpora import write_iemocap, write_meld, write_wav


def test_metrics_are_their_definitions():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    guess = np.array([0, 0, 0, 1, 1, 0, 2])
    probabilities = 0.05 + 0.85 * np.eye(3)[guess]
    found = summary(labels, probabilities)
    recall = [3 / 4, 1 / 2, 1.0]
    f1 = [3 / 4, 1 / 2, 1.0]  # precision equals recall here
    assert found["WA"] == pytest.approx(5 / 7)
    assert found["UA"] == pytest.approx(np.mean(recall))
    assert found["macro-F1"] == pytest.approx(np.mean(f1))
    assert found["weighted-F1"] == pytest.approx(np.average(f1, weights=[4, 2, 1]))
    assert found["ECE"] == pytest.approx(0.9 - 5 / 7)
    assert calibration_error(labels, np.eye(3)[labels]) == 0


def test_a_class_that_never_occurs_does_not_count():
    assert summary(np.array([0, 1]), np.eye(4)[[0, 1]])["UA"] == 1.0


def test_intervals_draw_dialogues():
    """All turns of a dialogue alike: 20 observations, not 2000."""
    rng = np.random.default_rng(0)
    dialogue = np.arange(20).repeat(100)
    values = rng.integers(2, size=20)[dialogue]
    low, high = interval(values, dialogue)
    assert high - low > 0.3
    low, high = interval(rng.integers(2, size=2000), dialogue)
    assert high - low < 0.06


def test_paired_test_finds_a_difference_and_no_other():
    rng = np.random.default_rng(0)
    dialogue = np.arange(60).repeat(10)
    base = rng.random(600) < 0.5
    better = base | (rng.random(600) < 0.2)
    assert compare(better, base, dialogue).p < 0.01
    assert compare(base, base, dialogue) == (0.0, 0.0, 0.0, 1.0)
    p = [
        compare(rng.random(600) < 0.5, rng.random(600) < 0.5, dialogue, 400, seed).p
        for seed in range(40)
    ]
    assert np.mean(np.array(p) < 0.1) < 0.3
    assert by_history(base, np.zeros(600, int))["7+"] is None


@pytest.fixture(scope="module")
def bench():
    corpus = build("baseline", {"test": 12, "validation": 2})
    listener = load_listener("demo", corpus.labels)
    encoded = {s: encode_corpus(listener, corpus.split(s)) for s in ("test", "validation")}
    return runs.Bench(corpus, lambda: load_listener("demo", corpus.labels), encoded)


def answers(bench, accuracy, seed) -> Scored:
    """A system that is right so often, at random."""
    rng, where = np.random.default_rng(seed), index_turns(bench.encoded["test"])
    right = rng.random(len(where)) < accuracy
    guess = np.where(right, where[:, 2], (where[:, 2] + 1) % 3)
    return as_scored(bench.encoded["test"], 0.1 + 0.7 * np.eye(3)[guess])


GOOD = {
    "memory": 0.9,
    "reset": 0.5,
    "wrong dialogue": 0.4,
    "swapped": 0.4,
    "never-written": 0.5,
    "smoothed host": 0.5,
    "host alone": 0.5,
}


def evaluation(bench, **changes):
    shares = {**GOOD, **changes}
    scored = {n: answers(bench, share, i) for i, (n, share) in enumerate(shares.items()) if share}
    return Evaluation(scored, {}, 0.0)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, [True, True, True]),
        ({"memory": 0.5}, [False, False, False]),
        ({"never-written": 0.9}, [False, True, True]),
        ({"never-written": None}, [False, True, True]),  # not measured is not shown
        ({"wrong dialogue": 0.9}, [False, True, True]),
        ({"swapped": 0.9}, [True, False, True]),
        ({"swapped": None}, [True, False, True]),
        ({"smoothed host": 0.9}, [True, True, False]),
    ],
)
def test_verdicts_can_say_no(bench, changes, shown):
    found = verdicts(evaluation(bench, **changes), bench, by_speaker=True)
    assert [v.shown for v in found] == shown
    for v in found:
        assert isinstance(v, Verdict)
        assert v.shown == all(line.startswith("✓") for line in v.evidence)


def test_report_holds_every_number(bench, tmp_path):
    values = as_json(evaluation(bench), bench, by_speaker=True)
    values |= {"about": {"arm": "gated-speaker"}, "corpus": "synthetic baseline"}
    text = report.markdown(json.loads(json.dumps(values)), "report.png")
    for name, figure in values["answers"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
        assert f"{figure['WA']:.3f}" in row
        assert f"{figure['ECE']:.3f}" in row
    assert text.count("**shown**") == 3
    picture = report.draw(tmp_path / "report.png", values)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- the command line -----------------------------------------------------------------------------


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return re.sub(r"\s+", " ", result.output)


def test_check_counts_and_says_what_is_missing(tmp_path):
    write_iemocap(tmp_path)
    output = invoke("check", "--corpus", "iemocap", "--root", tmp_path, code=1)
    assert "dialogues" in output
    assert "151" in output
    assert "no label files" in output
    assert "IEMOCAP_full_release" in invoke(
        "check", "--corpus", "iemocap", "--root", tmp_path / "x", code=1
    )
    assert "Nothing is known" in invoke("check", "--corpus", "synthetic:trap")


def test_train_and_evaluate_on_the_miniature_corpora(tmp_path):
    """The commands of the real corpora, with the demo's host for a dry run."""
    write_iemocap(tmp_path / "iemocap")
    meld_root = write_meld(tmp_path / "meld")
    for split, name in (
        ("train", "dia7_utt0"),
        ("train", "dia7_utt2"),
        ("validation", "dia0_utt0"),
        ("test", "dia0_utt0"),
        ("test", "final_videos_testdia0_utt1"),
    ):
        write_wav(meld_root / "wav" / split / f"{name}.wav", 0.7)
    # one dialogue more, to validate by: the fold takes every tenth
    source = tmp_path / "iemocap" / "IEMOCAP_full_release" / "Session1"
    for n in range(9):
        name = f"Ses01F_impro1{n}"
        text = f"[1.0000 - 2.0000]\t{name}_F000\tneu\t[2.5, 2.5, 2.5]\n"
        (source / "dialog" / "EmoEvaluation" / f"{name}.txt").write_text(text)
        write_wav(source / "sentences" / "wav" / name / f"{name}_F000.wav")
    for corpus, root in (("iemocap", tmp_path / "iemocap"), ("meld", meld_root)):
        run = tmp_path / f"run-{corpus}"
        options = ["--corpus", corpus, "--root", root, "--cache", tmp_path / "cache"]
        budget = ["--steps", 2, "--batch", 2, "--window", 3, "--evaluate-every", 1]
        invoke("train", "--out", run, *options, *budget)
        output = invoke("evaluate", run, "--generate")
        assert "of 2 not one label" in output
        assert "not shown" in output
        values = json.loads((run / "evaluation.json").read_text())
        assert "copy the speaker's last gold label" in values["rules"]
        assert values["answers"]["memory"]["turns"] == 2
        assert set(values["answers"]) >= {"reset", "read off", "wrong dialogue", "swapped"}
        assert (run / "report.png").stat().st_size > 10_000
        assert "## Verdicts" in (run / "report.md").read_text()


def test_what_cannot_be_is_refused_in_words(tmp_path):
    assert "CorpusError" in invoke("train", "--out", tmp_path, "--corpus", "radio", code=1)
    assert "train a run there first" in invoke("evaluate", tmp_path, code=1)
    assert "gated-speaker" in invoke("arms")
