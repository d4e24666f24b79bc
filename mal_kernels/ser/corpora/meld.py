"""MELD, from the directory ``MELD.Raw`` with its archives unpacked, and its preparation.

The sound is in ``dia{D}_utt{U}.mp4`` (AAC, mostly 5.1). :func:`prepare` turns it into 16 kHz mono
wav with ffmpeg once; the loader reads those. Dialogue ids restart in every split and both kinds of
id have gaps; turns are ordered by their id, for 31 dialogues have times that are not.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import Corpus, CorpusError, Dialogue, Turn

LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
# split → name in the files, folder of its clips
SPLITS = {
    "train": ("train", "train_splits"),
    "validation": ("dev", "dev_splits_complete"),
    "test": ("test", "output_repeated_splits_test"),
}
COLUMNS = {"Speaker", "Emotion", "Dialogue_ID", "Utterance_ID", "StartTime", "EndTime"}
TIME = re.compile(r"^(\d{1,2}):(\d{2}):(\d{2}),(\d{3})$")
# known to be missing or damaged in the release, and cut at the wrong place there
BROKEN = {("train", 125, 3), ("validation", 110, 7)}
MISCUT = {("test", 38, 4), ("test", 220, 0), ("train", 309, 0)}
ROWS = {"train": 9989, "validation": 1109, "test": 2610}
DIALOGUES = {"train": 1038, "validation": 114, "test": 280}
EMOTIONS = {
    "neutral": 6436,
    "joy": 2308,
    "surprise": 1636,
    "anger": 1607,
    "sadness": 1002,
    "disgust": 361,
    "fear": 358,
}


def expected() -> dict[str, int]:
    """Counts of the complete corpus."""
    counts = {"dialogues": sum(DIALOGUES.values()), "turns": sum(ROWS.values())}
    counts["turns without audio"] = len(BROKEN)
    counts |= {f"dialogues, {split}": n for split, n in DIALOGUES.items()}
    counts |= {f"turns, {split}": n for split, n in ROWS.items()}
    return counts | {f"labelled {label}": n for label, n in EMOTIONS.items()}


def seconds(text: str) -> float:
    """``00:16:16,059`` or ``0:16:16,059`` in seconds.

    Raises:
        CorpusError: neither.

    Example:
        >>> seconds("0:10:44,769")
        644.769
    """
    match = TIME.match(text.strip())
    if match is None:
        raise CorpusError(f"time is {text!r}; expected hours:minutes:seconds,milliseconds.")
    h, m, s, ms = map(int, match.groups())
    return 3600 * h + 60 * m + s + ms / 1000


def load(root: Path, wavs: Path, *, prefer_final: bool = True) -> Corpus:
    """The three splits as they were published.

    Args:
        root: ``MELD.Raw``.
        wavs: where :func:`prepare` has put the sound.
        prefer_final: take the corrected cut ``final_videos_test*`` where the test has both.

    Raises:
        CorpusError: a CSV is missing or is not one of MELD.
    """
    dialogues: list[Dialogue] = []
    notes: list[str] = []
    for split in SPLITS:
        rows = _read_csv(_csv_path(root, split), notes)
        chosen = clips(root, split, prefer_final)
        turns: dict[int, list[tuple[int, Turn]]] = {}
        for d, u, row in rows:
            turn = _turn(split, d, u, row, chosen, wavs, notes)
            turns.setdefault(d, []).append((u, turn))
        dialogues += [
            Dialogue(
                f"{split}-dia{d}", tuple(t for _, t in sorted(found, key=lambda x: x[0])), split
            )
            for d, found in sorted(turns.items())
        ]
    return Corpus("MELD", LABELS, tuple(dialogues), expected(), tuple(notes))


def _turn(
    split: str,
    d: int,
    u: int,
    row: dict[str, str],
    chosen: dict[tuple[int, int], Path],
    wavs: Path,
    notes: list[str],
) -> Turn:
    name = f"{split}-dia{d}_utt{u}"
    label: str | None = row["Emotion"].strip().lower()
    if label not in LABELS:
        notes.append(f"{name}: unknown emotion {row['Emotion']!r}")
        label = None
    clip = chosen.get((d, u))
    wav = None if clip is None else wav_path(wavs, split, clip)
    known = (split, d, u) in BROKEN
    if wav is None or known or not wav.is_file():
        reason = "damaged in the release" if known else "no clip" if wav is None else "no wav"
        notes.append(f"{name}: {reason}")
        wav = None
    note = "cut at the wrong place in the release" if (split, d, u) in MISCUT else ""
    start, end = seconds(row["StartTime"]), seconds(row["EndTime"])
    return Turn(name, row["Speaker"].strip(), wav, label, start, end, note)


def _csv_path(root: Path, split: str) -> Path:
    name = SPLITS[split][0]
    for path in (root / f"{name}_sent_emo.csv", root / name / f"{name}_sent_emo.csv"):
        if path.is_file():
            return path
    raise CorpusError(
        f"root is {root}, which has no {name}_sent_emo.csv; pass the unpacked MELD.Raw."
    )


def _read_csv(path: Path, notes: list[str]) -> list[tuple[int, int, dict[str, str]]]:
    """Rows with their ids; those that are cut short or have bad ids or times are noted."""
    rows = []
    with path.open(encoding="utf-8", newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        missing = COLUMNS - set(reader.fieldnames or ())
        if missing:
            raise CorpusError(f"{path} has no columns {sorted(missing)}; it is not one of MELD.")
        for row in reader:
            try:
                if any(row[column] is None for column in COLUMNS):
                    raise ValueError("too few columns")
                d, u = int(row["Dialogue_ID"]), int(row["Utterance_ID"])
                seconds(row["StartTime"]), seconds(row["EndTime"])
            except ValueError as error:  # CorpusError is one
                notes.append(f"{path.name}:{reader.line_num}: left out, {error}")
                continue
            rows.append((d, u, row))
    return rows


def clips(root: Path, split: str, prefer_final: bool = True) -> dict[tuple[int, int], Path]:
    """The clip of each (dialogue, utterance) of a split."""
    name, folder = SPLITS[split]
    places = [place for place in (root / name / folder, root / folder) if place.is_dir()]
    plain: dict[tuple[int, int], Path] = {}
    final: dict[tuple[int, int], Path] = {}
    for place in places:
        for path in sorted(place.glob("[!.]*.mp4")):
            match = re.match(r"^(final_videos_test)?dia(\d+)_utt(\d+)\.mp4$", path.name)
            if match is not None:
                (final if match[1] else plain)[int(match[2]), int(match[3])] = path
    return {**final, **plain} if not prefer_final else {**plain, **final}


def wav_path(wavs: Path, split: str, clip: Path) -> Path:
    """Where :func:`prepare` puts the sound of ``clip``."""
    return wavs / split / f"{clip.stem}.wav"


def prepare(
    root: Path,
    wavs: Path,
    *,
    prefer_final: bool = True,
    workers: int = 4,
    on_clip: Callable[[], object] = lambda: None,
) -> list[str]:
    """Extracts 16 kHz mono wav from every clip that has none yet; can be stopped and run again.

    Six channels are mixed down: the voices are in the centre one.

    Args:
        root: ``MELD.Raw``.
        wavs: where to put them.
        prefer_final: as for :func:`load`.
        workers: ffmpeg processes.
        on_clip: called after each clip.

    Returns:
        What failed, and why. The two clips that are damaged in the release do.

    Raises:
        CorpusError: ffmpeg is missing, or there are no clips.
    """
    jobs = [
        (path, wav_path(wavs, split, path))
        for split in SPLITS
        for path in clips(root, split, prefer_final).values()
    ]
    if not jobs:
        raise CorpusError(f"root is {root}, which has no clips; unpack the archives in MELD.Raw.")
    if shutil.which("ffmpeg") is None:
        raise CorpusError(
            "ffmpeg is not on PATH, and MELD's sound is in mp4; install it (apt install ffmpeg, "
            "brew install ffmpeg, conda install ffmpeg) and run `prepare` again."
        )

    def extract(job: tuple[Path, Path]) -> str | None:
        clip, wav = job
        failure = None if wav.exists() else _ffmpeg(clip, wav)
        on_clip()
        return failure

    with ThreadPoolExecutor(workers) as pool:
        return [failure for failure in pool.map(extract, jobs) if failure is not None]


def _ffmpeg(clip: Path, wav: Path) -> str | None:
    """Writes ``wav`` whole or not at all; returns what went wrong."""
    wav.parent.mkdir(parents=True, exist_ok=True)
    partial = wav.with_suffix(".part")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", str(clip), "-vn", "-ac", "1"]
    command += ["-ar", "16000", "-c:a", "pcm_s16le", "-f", "wav", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not partial.exists():
        partial.unlink(missing_ok=True)
        return f"{clip.name}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
    partial.replace(wav)
    return None
