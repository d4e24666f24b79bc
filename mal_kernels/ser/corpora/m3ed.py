"""M3ED (Chinese), from its release directory.

``annotation.json`` is ``{movie: {clip: {"Dialog": {turn: {"Speaker", "EmoAnnotation", ...}}}}}``,
``splitInfo/movie_list_{train,val,test}.txt`` lists the movies of each split, and
``modality_speech/<movie>/<clip>/{A|B}_<turn>.wav`` (or without the folders) is the sound.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import Corpus, CorpusError, Dialogue, Turn

LABELS = ("Neutral", "Happy", "Surprise", "Sad", "Disgust", "Anger", "Fear")
SPLITS = {"train": "train", "val": "validation", "test": "test"}
EXPECTED = {"turns": 24437}


def load(root: Path) -> Corpus:
    """All dialogues of the listed movies.

    Raises:
        CorpusError: the annotation or a list of movies is missing or damaged.
    """
    path = root / "annotation.json"
    try:
        annotation = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"cannot read {path} ({error}); pass the release directory of M3ED."
        ) from error
    dialogues: list[Dialogue] = []
    notes: list[str] = []
    for short, split in SPLITS.items():
        listing = root / "splitInfo" / f"movie_list_{short}.txt"
        if not listing.is_file():
            raise CorpusError(f"{listing} does not exist; it says which movies are in {split}.")
        for movie in filter(None, map(str.strip, listing.read_text(encoding="utf-8").splitlines())):
            if movie not in annotation:
                notes.append(f"{movie}: listed in {listing.name}, but not annotated")
            for clip, content in annotation.get(movie, {}).items():
                turns = _turns(root / "modality_speech", movie, clip, content, notes)
                if turns:
                    dialogues.append(Dialogue(f"{movie}/{clip}", turns, split, movie))
    return Corpus("M3ED", LABELS, tuple(dialogues), EXPECTED, tuple(notes))


def _turns(
    speech: Path, movie: str, clip: str, content: dict[str, Any], notes: list[str]
) -> tuple[Turn, ...]:
    """In the order of the numbers in their ids."""
    turns = []
    for name, about in (content.get("Dialog") or {}).items():
        try:
            speaker = str(about["Speaker"])
            emotion = str(about["EmoAnnotation"]["final_main_emo"])
        except (KeyError, TypeError) as error:
            notes.append(f"{movie}/{clip}/{name}: left out, {type(error).__name__}: {error}")
            continue
        file = f"{speaker}_{name}.wav"
        places = (speech / movie / clip / file, speech / movie / file, speech / file)
        audio = next((place for place in places if place.is_file()), None)
        if audio is None:
            notes.append(f"{file}: missing")
        label = next((known for known in LABELS if known.lower() == emotion.lower()), None)
        turns.append(Turn(f"{movie}/{clip}/{name}", speaker, audio, label))
    turns.sort(key=lambda turn: [int(n) for n in re.findall(r"\d+", turn.id.rsplit("/", 1)[-1])])
    return tuple(turns)
