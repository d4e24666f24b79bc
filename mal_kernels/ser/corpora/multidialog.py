"""MultiDialog (IVLLab), from a copy of its Hugging Face repository with the archives unpacked.

``metadata/<split>/*.jsonl`` has one line per turn, with ``conv_id``, ``utterance_id``, ``from``,
``emotion`` and ``audpath`` (or ``audio_fpath``); the sound lies in ``data/<split>/``. The published
loading script does not run any more, so the files are read directly. The emotion is the one that
the actors were given with the text, not one that listeners have perceived.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import Corpus, CorpusError, Dialogue, Turn

LABELS = (
    "Neutral",
    "Happy",
    "Fearful",
    "Angry",
    "Disgusted",
    "Surprised",
    "Sad",
    "Curious to dive deeper",
)
SPLITS = {
    "train": "train",
    "valid_freq": "validation",
    "valid_rare": "validation",
    "test_freq": "test",
    "test_rare": "test",
}
EXPECTED = {"dialogues": 8733, "turns": 187859}
AUDIO_FIELDS = ("audpath", "audio_fpath")


def load(root: Path) -> Corpus:
    """All splits that are there; the kind of a dialogue is its published split.

    Raises:
        CorpusError: no metadata.
    """
    dialogues: list[Dialogue] = []
    notes: list[str] = []
    for published, split in SPLITS.items():
        turns: dict[str, list[tuple[int, Turn]]] = {}
        for file in sorted((root / "metadata" / published).glob("[!.]*.jsonl")):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            for number, line in enumerate(lines, start=1):
                try:
                    name, index, turn = _turn(root / "data" / published, json.loads(line), notes)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    notes.append(f"{file.name}:{number}: left out, {type(error).__name__}: {error}")
                    continue
                turns.setdefault(name, []).append((index, turn))
        dialogues += [
            Dialogue(name, tuple(t for _, t in sorted(found, key=lambda x: x[0])), split, published)
            for name, found in sorted(turns.items())
        ]
    if not dialogues:
        raise CorpusError(
            f"root is {root}, which has no metadata/<split>/*.jsonl; pass a copy of the repository."
        )
    return Corpus("MultiDialog", LABELS, tuple(dialogues), EXPECTED, tuple(notes))


def _turn(data: Path, row: dict[str, Any], notes: list[str]) -> tuple[str, int, Turn]:
    dialogue, index = str(row["conv_id"]), int(re.sub(r"\D", "", str(row["utterance_id"])))
    name = f"{dialogue}/{row['utterance_id']}"
    path = next((row[field] for field in AUDIO_FIELDS if row.get(field)), None)
    found = _find(data, str(path)) if path else None
    if found is None:
        notes.append(f"{name}: no audio at {path}")
    label = next((known for known in LABELS if known.lower() == str(row["emotion"]).lower()), None)
    return dialogue, index, Turn(name, str(row["from"]), found, label)


def _find(data: Path, path: str) -> Path | None:
    """The file, whichever of its published parents the archive was unpacked with."""
    parts = Path(path).parts
    tails = (data.joinpath(*parts[i:]) for i in range(len(parts)))
    return next((tail for tail in tails if tail.is_file()), None)
