"""Folders that look like the corpora of emotional speech, with made sound."""

import wave
from pathlib import Path

import numpy as np


def write_wav(path: Path, seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(seconds * rate)) / rate
    sound = (8000 * np.sin(2 * np.pi * 200 * t)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(sound, channels).tobytes())
    return path


HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"


TURNS = {
    "Ses01F_impro01": [
        ("6.2901", "8.2357", "F000", "neu"),
        ("10.0100", "11.3925", "M001", "fru"),
        ("8.1000", "9.0000", "M000", "exc"),  # starts before M001, and overlaps F000
        ("12.0000", "13.0000", "F001", "xxx"),
    ],
    "Ses01M_script01_1b": [
        ("1.0000", "2.0000", "M000", "ang"),
        ("3.0000", "4.0000", "F000", "sad"),
    ],
    "Ses05F_impro03": [("1.0000", "2.0000", "M000", "hap"), ("2.5000", "3.0000", "F000", "neu")],
}


def label_line(start: str, end: str, name: str, label: str) -> str:
    return f"[{start} - {end}]\t{name}\t{label}\t[2.5000, 2.5000, 2.5000]\n"


def write_iemocap(root: Path) -> Path:
    release = root / "IEMOCAP_full_release"
    for dialogue, turns in TURNS.items():
        folder = release / f"Session{dialogue[4]}"
        text = HEADER
        for start, end, turn, label in turns:
            text += label_line(start, end, f"{dialogue}_{turn}", label)
            text += "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
            write_wav(folder / "sentences" / "wav" / dialogue / f"{dialogue}_{turn}.wav")
        labels = folder / "dialog" / "EmoEvaluation"
        (labels / "Categorical").mkdir(parents=True, exist_ok=True)
        (labels / f"{dialogue}.txt").write_text(text)
        (labels / f"._{dialogue}.txt").write_bytes(b"\x00\x05\x16\x07mac")
        (labels / "Categorical" / f"{dialogue}_e1_cat.txt").write_text("not a label file")
    return release


MELD_HEAD = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    "StartTime,EndTime\r\n"
)


MELD_ROWS = {
    # a curly quote, a one-digit hour, ids with gaps, times out of order, a compound speaker
    "train": [
        (7, 2, "Joey/Drake", "joy", "0:10:44,769", "0:10:46,146"),
        (7, 0, "Monica and Ross", "neutral", "00:16:16,059", "00:16:21,731"),
        (125, 3, "Ross", "anger", "00:00:01,000", "00:00:02,000"),
    ],
    "dev": [(0, 0, "Rachel", "sadness", "00:00:01,000", "00:00:02,000")],
    "test": [
        (0, 0, "Phoebe", "surprise", "00:00:01,000", "00:00:02,000"),
        (0, 1, "Mark", "disgust", "00:00:03,000", "00:00:04,000"),
    ],
}


FOLDERS = {
    "train": "train/train_splits",
    "dev": "dev/dev_splits_complete",
    "test": "test/output_repeated_splits_test",
}


def write_meld(root: Path) -> Path:
    for split, rows in MELD_ROWS.items():
        text = MELD_HEAD
        clips = root / FOLDERS[split]
        clips.mkdir(parents=True)
        for number, (d, u, speaker, emotion, start, end) in enumerate(rows):
            text += f'{number},"Oh, it’s you",{speaker},{emotion},neutral,{d},{u},8,21,'
            text += f'"{start}","{end}"\r\n'
            (clips / f"dia{d}_utt{u}.mp4").write_text("mp4")
            (clips / f"._dia{d}_utt{u}.mp4").write_bytes(b"mac")
        (root / f"{split}_sent_emo.csv").write_bytes(text.encode())
    (root / FOLDERS["test"] / "final_videos_testdia0_utt1.mp4").write_text("mp4")
    (root / FOLDERS["train"] / "dia125_utt3.mp4").write_text("damaged")
    return root
