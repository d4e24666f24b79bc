"""IEMOCAP, from the full release directory.

Session{1..5}/dialog/EmoEvaluation/<dialogue>.txt holds the consensus labels, one line per turn::

    [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]

and sentences/wav/<dialogue>/<turn>.wav the sound. The letter before the last number is the speaker;
the one in the prefix says who wears the motion markers. Turns are ordered by their start, since F
and M are numbered apart. Turns with another label are heard, but not scored.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import Corpus, CorpusError, Dialogue, Turn

LINE = re.compile(
    r"^\[(\d+\.\d+)\s*-\s*(\d+\.\d+)\]\s+(\S+)\s+(\w{3})\s+\[([\d.]+),\s*([\d.]+),\s*([\d.]+)\]"
)
TURN = re.compile(r"^(?P<dialogue>Ses\d\d[FM]_.+)_(?P<speaker>[FM])(?P<number>\d+)$")
SESSIONS = range(1, 6)
# code in the release → label, by number of classes
CLASSES = {
    4: {"ang": "angry", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"},
    6: {
        "hap": "happy",
        "sad": "sad",
        "neu": "neutral",
        "ang": "angry",
        "exc": "excited",
        "fru": "frustrated",
    },
}
DIALOGUES = (28, 30, 32, 30, 31)
TURNS = (1819, 1811, 2136, 2103, 2170)
SCORED_4 = (1085, 1023, 1151, 1031, 1241)
LABELS_4 = {"angry": 1103, "happy": 1636, "neutral": 1708, "sad": 1084}


def expected(classes: int) -> dict[str, int]:
    """Counts of the complete corpus."""
    counts = {"dialogues": sum(DIALOGUES), "turns": sum(TURNS), "turns without audio": 0}
    for i, session in enumerate(SESSIONS):
        counts[f"dialogues, session {session}"] = DIALOGUES[i]
        counts[f"turns, session {session}"] = TURNS[i]
        if classes == 4:
            counts[f"scored, session {session}"] = SCORED_4[i]
    if classes == 4:
        counts |= {f"labelled {label}": n for label, n in LABELS_4.items()}
    return counts | {"scored": 5531 if classes == 4 else 7433}


def load(root: Path, classes: int = 4) -> Corpus:
    """All dialogues; the split of each is its session.

    Args:
        root: ``IEMOCAP_full_release``, or the directory that contains it.
        classes: 4 (happy includes excited) or 6.

    Raises:
        CorpusError: no such directory, no session in it, or another number of classes.
    """
    if classes not in CLASSES:
        raise CorpusError(f"classes is {classes}; IEMOCAP is scored on {list(CLASSES)} classes.")
    inner = root / "IEMOCAP_full_release"
    root = inner if inner.is_dir() else root
    dialogues: list[Dialogue] = []
    notes: list[str] = []
    for session in SESSIONS:
        folder = root / f"Session{session}"
        files = sorted((folder / "dialog" / "EmoEvaluation").glob("[!.]*.txt"))
        if not files:
            notes.append(f"session {session}: no label files in {folder / 'dialog/EmoEvaluation'}")
        for file in files:
            dialogue, odd = _dialogue(file, folder, f"session {session}", CLASSES[classes])
            notes += odd
            if dialogue.turns:
                dialogues.append(dialogue)
    if not dialogues:
        raise CorpusError(
            f"root is {root}, which holds no Session1..5/dialog/EmoEvaluation/*.txt; pass the "
            "directory IEMOCAP_full_release."
        )
    labels = tuple(dict.fromkeys(CLASSES[classes].values()))
    return Corpus(
        f"IEMOCAP {classes} classes", labels, tuple(dialogues), expected(classes), tuple(notes)
    )


def _dialogue(
    file: Path, folder: Path, split: str, classes: dict[str, str]
) -> tuple[Dialogue, list[str]]:
    turns, notes = [], []
    for number, line in enumerate(
        file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
    ):
        match = LINE.match(line)
        if match is None:
            if line.startswith("[") and "Ses" in line:
                notes.append(f"{file.name}:{number}: not a label line: {line[:60]!r}")
            continue
        start, end, name, code = match.group(1, 2, 3, 4)
        parts = TURN.match(name)
        if parts is None or parts["dialogue"] != file.stem:
            notes.append(f"{file.name}:{number}: {name!r} is no turn of this dialogue")
            continue
        path = folder / "sentences" / "wav" / file.stem / f"{name}.wav"
        audio = path if path.is_file() else None
        if audio is None:
            notes.append(f"{path} is missing")
        note = "" if audio else "no audio"
        times = (float(start), float(end))
        # two actors per session: Ses01F and Ses01M are the same persons in all its dialogues
        speaker = name[:5] + parts["speaker"]
        turns.append(Turn(name, speaker, audio, classes.get(code), *times, note))
    turns.sort(key=lambda turn: (turn.start, turn.end, turn.id))
    kind = "improvised" if "impro" in file.stem else "scripted"
    return Dialogue(file.stem, tuple(turns), split, kind), notes


def fold(corpus: Corpus, test: int = 5, validation: float = 0.1) -> Corpus:
    """Leave one session out: its dialogues are the test, the others train and validation.

    Args:
        corpus: of :func:`load`.
        test: session, 1 to 5.
        validation: share of the other dialogues, whole ones, evenly spread, to stop by.

    Raises:
        CorpusError: no such session.
    """
    if f"session {test}" not in {d.split for d in corpus.dialogues}:
        raise CorpusError(f"fold is {test}, but {corpus.name} has no dialogues of that session.")
    every = max(2, round(1 / validation))
    dialogues, others = [], 0
    for d in corpus.dialogues:
        if d.split == f"session {test}":
            split = "test"
        else:
            split = "validation" if others % every == every - 1 else "train"
            others += 1
        dialogues.append(Dialogue(d.id, d.turns, split, d.kind))
    name = f"{corpus.name}, session {test} held out"
    return Corpus(name, corpus.labels, tuple(dialogues), {}, corpus.notes)
