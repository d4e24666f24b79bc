"""Loaders against small directories written exactly as the releases are."""

import json
import stat
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal_kernels.errors import AudioFileError
from mal_kernels.ser.corpora import (
    Corpus,
    CorpusError,
    Dialogue,
    Turn,
    iemocap,
    m3ed,
    meld,
    multidialog,
    read_audio,
)
from tests.support.corpora import (
    TURNS,
    label_line,
    write_iemocap,
    write_meld,
    write_wav,
)

# --- IEMOCAP --------------------------------------------------------------------------------------

# speaker F has her marks on in F dialogues; who speaks is the letter of the last token


def test_iemocap_reads_order_speakers_and_labels(tmp_path):
    corpus = iemocap.load(write_iemocap(tmp_path))
    assert [d.id for d in corpus.dialogues] == list(TURNS)
    first = corpus.dialogues[0]
    assert [t.id[-4:] for t in first.turns] == ["F000", "M000", "M001", "F001"]  # by start
    assert [t.speaker for t in first.turns] == ["Ses01F", "Ses01M", "Ses01M", "Ses01F"]
    # frustrated and "no majority" are heard, but not scored among four classes
    assert [t.label for t in first.turns] == ["neutral", "happy", None, None]
    assert [d.kind for d in corpus.dialogues] == ["improvised", "scripted", "improvised"]
    # the same person wherever the markers are
    assert corpus.dialogues[1].turns[0].speaker == "Ses01M"
    assert corpus.counts()["scored"] == 6
    assert not [note for note in corpus.notes if "session 1" in note]


def test_iemocap_accepts_the_parent_and_six_classes(tmp_path):
    write_iemocap(tmp_path)
    corpus = iemocap.load(tmp_path, classes=6)
    labels = [t.label for t in corpus.dialogues[0].turns]
    assert labels == ["neutral", "excited", "frustrated", None]
    with pytest.raises(CorpusError, match="classes is 5"):
        iemocap.load(tmp_path, classes=5)
    with pytest.raises(CorpusError, match="IEMOCAP_full_release"):
        iemocap.load(tmp_path / "elsewhere")


def test_iemocap_says_what_is_missing(tmp_path):
    release = write_iemocap(tmp_path)
    gone = release / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M000.wav"
    gone.unlink()
    corpus = iemocap.load(release)
    turn = corpus.dialogues[0].turns[1]
    assert turn.audio is None
    assert read_audio(turn) is None
    assert any(str(gone) in note for note in corpus.notes)
    assert any("session 2" in note for note in corpus.notes)
    wrong = corpus.check()
    assert wrong["dialogues"] == (3, 151)
    assert wrong["turns without audio"] == (1, 0)


def test_iemocap_counts_of_the_full_release():
    """Published totals and those by session and label say the same."""
    for classes, scored in ((4, 5531), (6, 7433)):
        counts = iemocap.expected(classes)
        assert counts["dialogues"] == 151
        assert counts["turns"] == 10_039
        assert counts["scored"] == scored
    assert sum(iemocap.SCORED_4) == sum(iemocap.LABELS_4.values()) == 5531


def test_iemocap_fold_keeps_dialogues_whole_and_speakers_apart(tmp_path):
    write_iemocap(tmp_path)
    corpus = iemocap.fold(iemocap.load(tmp_path), test=5, validation=0.5)
    assert [d.split for d in corpus.dialogues] == ["train", "validation", "test"]
    with pytest.raises(CorpusError, match="fold is 2"):
        iemocap.fold(iemocap.load(tmp_path), test=2)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(st.text(max_size=80), max_size=6), cut=st.integers(0, 60))
def test_iemocap_survives_malformed_lines(tmp_path, lines, cut):
    """Whatever else stands in a label file, its one good line is read and no other is invented."""
    release = write_iemocap(tmp_path)
    good = label_line("1.0000", "2.0000", "Ses05F_impro03_M000", "hap")
    damaged = label_line("3.0000", "4.0000", "Ses05F_impro03_F000", "neu")[:cut]
    path = release / "Session5/dialog/EmoEvaluation/Ses05F_impro03.txt"
    text = "\n".join([*(line.replace("Ses", "S") for line in lines), damaged, ""]) + good
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    turns = iemocap.load(release).dialogues[-1].turns
    assert [t.id for t in turns] == ["Ses05F_impro03_M000"]


# --- MELD -----------------------------------------------------------------------------------------


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """Stands for ffmpeg: writes half a second of wav, or fails as it does on a damaged clip."""
    wav = write_wav(tmp_path / "sound.wav")
    tool = tmp_path / "bin" / "ffmpeg"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nimport pathlib, shutil, sys\n"
        "clip = pathlib.Path(sys.argv[sys.argv.index('-i') + 1])\n"
        "assert sys.argv[sys.argv.index('-ac') + 1] == '1', 'six channels are mixed down'\n"
        "if clip.read_text() == 'damaged': sys.exit('moov atom not found')\n"
        f"shutil.copy({str(wav)!r}, sys.argv[-1])\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tool.parent))
    return tool


def test_meld_is_prepared_once_and_loaded(tmp_path, ffmpeg):
    root, wavs = write_meld(tmp_path / "MELD.Raw"), tmp_path / "wav"
    seen = []
    failed = meld.prepare(root, wavs, on_clip=lambda: seen.append(1))
    assert len(seen) == 6  # the corrected cut replaces the plain one
    assert failed == ["dia125_utt3.mp4: moov atom not found"]
    written = {path: path.stat().st_mtime_ns for path in wavs.rglob("*.wav")}
    assert meld.prepare(root, wavs) == failed
    assert {path: path.stat().st_mtime_ns for path in wavs.rglob("*.wav")} == written
    assert not list(wavs.rglob("*.part"))

    corpus = meld.load(root, wavs)
    assert [d.id for d in corpus.dialogues] == [
        *("train-dia7", "train-dia125", "validation-dia0", "test-dia0")
    ]
    first = corpus.dialogues[0]
    assert [t.id for t in first.turns] == ["train-dia7_utt0", "train-dia7_utt2"]  # not by time
    assert [t.speaker for t in first.turns] == ["Monica and Ross", "Joey/Drake"]
    assert first.turns[1].start == 644.769
    damaged = corpus.dialogues[1].turns[0]
    assert damaged.audio is None
    assert any("damaged in the release" in note for note in corpus.notes)
    assert corpus.dialogues[-1].turns[1].audio.name == "final_videos_testdia0_utt1.wav"
    plain = meld.load(root, wavs, prefer_final=False)
    assert plain.dialogues[-1].turns[1].audio is None  # that cut was not prepared
    assert corpus.counts()["scored"] == 5


def test_meld_without_ffmpeg_says_so(tmp_path, monkeypatch):
    root = write_meld(tmp_path / "MELD.Raw")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CorpusError, match="ffmpeg is not on PATH"):
        meld.prepare(root, tmp_path / "wav")
    with pytest.raises(CorpusError, match="train_sent_emo"):
        meld.load(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "9,cut short\r\n",
        '9,"x",Ross,joy,positive,one,2,8,21,"00:00:01,000","00:00:02,000"\r\n',
        '9,"x",Ross,joy,positive,9,2,8,21,"soon","00:00:02,000"\r\n',
    ],
)
def test_meld_leaves_malformed_rows_out(tmp_path, line):
    root = write_meld(tmp_path)
    with (root / "dev_sent_emo.csv").open("a", newline="") as file:
        file.write(line)
    corpus = meld.load(root, tmp_path / "wav")
    assert corpus.counts()["turns"] == 6
    assert any(note.startswith("dev_sent_emo.csv:3: left out") for note in corpus.notes)


def test_meld_counts_of_the_full_release():
    counts = meld.expected()
    assert counts["turns"] == 13_708 == sum(meld.EMOTIONS.values())
    assert counts["turns without audio"] == 2
    assert set(meld.EMOTIONS) == set(meld.LABELS)


# --- MultiDialog and M3ED -------------------------------------------------------------------------


def test_multidialog(tmp_path):
    rows = [
        dict(conv_id="t_1", utterance_id=1, emotion="Happy", audpath="t_1/t_1_1b.wav"),
        dict(conv_id="t_1", utterance_id=0, emotion="Neutral", audio_fpath="x/t_1/t_1_0a.wav"),
        dict(conv_id="t_1", utterance_id=2, emotion="Bored", audpath="t_1/gone.wav"),
    ]
    for i, row in enumerate(rows):
        row["from"], row["value"] = ("gpt", "human")[i % 2], "text"
    metadata = tmp_path / "metadata" / "test_rare" / "test_rare_metadata_0000.jsonl"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("\n".join([*map(json.dumps, rows), "{damaged", '{"conv_id": 3}']))
    for name in ("t_1_1b", "t_1_0a"):
        write_wav(tmp_path / "data" / "test_rare" / "t_1" / f"{name}.wav")
    corpus = multidialog.load(tmp_path)
    (dialogue,) = corpus.dialogues
    assert (dialogue.split, dialogue.kind) == ("test", "test_rare")
    assert [t.id for t in dialogue.turns] == ["t_1/0", "t_1/1", "t_1/2"]
    assert [t.label for t in dialogue.turns] == ["Neutral", "Happy", None]
    assert [t.audio is not None for t in dialogue.turns] == [True, True, False]
    assert sum("left out" in note for note in corpus.notes) == 2
    with pytest.raises(CorpusError, match="metadata"):
        multidialog.load(tmp_path / "data")


def test_m3ed(tmp_path):
    def turn(speaker, emotion):
        return {"Speaker": speaker, "EmoAnnotation": {"final_main_emo": emotion}}

    clip = {
        "SpeakerInfo": {"A": {"Name": "one"}, "B": {"Name": "two"}},
        "Dialog": {"m_1_10": turn("A", "Anger"), "m_1_2": turn("B", "Sad"), "m_1_3": {}},
    }
    (tmp_path / "annotation.json").write_text(json.dumps({"m": {"m_1": clip}}))
    (tmp_path / "splitInfo").mkdir()
    for short, movies in {"train": "m\n", "val": "\n", "test": "other\n"}.items():
        (tmp_path / "splitInfo" / f"movie_list_{short}.txt").write_text(movies)
    write_wav(tmp_path / "modality_speech" / "m" / "m_1" / "A_m_1_10.wav")
    corpus = m3ed.load(tmp_path)
    (dialogue,) = corpus.dialogues
    assert [t.id for t in dialogue.turns] == ["m/m_1/m_1_2", "m/m_1/m_1_10"]
    assert [t.audio is not None for t in dialogue.turns] == [False, True]
    assert any("other" in note for note in corpus.notes)
    assert any("left out" in note for note in corpus.notes)
    (tmp_path / "annotation.json").write_text("{")
    with pytest.raises(CorpusError, match="cannot read"):
        m3ed.load(tmp_path)


# --- sound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "rate", "channels", "samples"),
    [(0.5, 16_000, 1, 8000), (0.5, 48_000, 6, 8000), (31.0, 16_000, 1, 480_000)],
)
def test_sound_is_mono_at_16_khz_and_bounded(tmp_path, seconds, rate, channels, samples):
    turn = Turn("t", "A", write_wav(tmp_path / "a.wav", seconds, rate, channels), None)
    wave_ = read_audio(turn)
    assert wave_.dtype == np.float32
    assert len(wave_) == samples
    assert 0.15 < np.abs(wave_).max() < 0.3


@pytest.mark.parametrize("seconds", [0.0, 0.064])
def test_too_short_a_clip_keeps_its_place_only(tmp_path, seconds):
    assert read_audio(Turn("t", "A", write_wav(tmp_path / "a.wav", seconds), "neutral")) is None


def test_unreadable_sound_is_refused(tmp_path):
    (tmp_path / "a.wav").write_text("not audio")
    with pytest.raises(AudioFileError, match="not readable"):
        read_audio(Turn("t", "A", tmp_path / "a.wav", None))
    with pytest.raises(AudioFileError, match="no such file"):
        read_audio(Turn("t", "A", tmp_path / "b.wav", None))


def test_an_unknown_split_is_refused():
    corpus = Corpus("c", ("sad",), (Dialogue("d", (Turn("t", "A", None, "sad"),), "test"),))
    assert corpus.split("test").dialogues == corpus.dialogues
    with pytest.raises(CorpusError, match="split is 'dev'"):
        corpus.split("dev")
