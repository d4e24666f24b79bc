"""From settings to corpus, host, encoded turns and model; and a trained run from its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..dialogues.files import read_tensors, write_tensors
from ..errors import ArgumentError
from .corpora import Corpus, CorpusError, iemocap, m3ed, meld, multidialog, synthetic
from .host import EncodedDialogue, Listener, encode_corpus, load_listener
from .memories import ARMS, TitansMemory
from .model import DialogueModel, new_model
from .train import DialogueTrainer, Settings, arguments

WEIGHTS, KIND = "model.safetensors", "dialogue model"
SYNTHETIC = "synthetic:"
CORPORA = ("iemocap", "iemocap6", "meld", "multidialog", "m3ed")
VALIDATION, TEST = 100, 250  # synthetic dialogues


def open_corpus(
    name: str,
    root: Path | None = None,
    *,
    fold: int | None = None,
    train: int = 2000,
    test: int = TEST,
) -> Corpus:
    """A corpus by name.

    Args:
        name: ``synthetic:<variant>`` or one of :data:`CORPORA`.
        root: directory of a real one; MELD's wav files are expected in ``<root>/wav``.
        fold: session of IEMOCAP to hold out; ``None`` leaves the sessions as splits.
        train: synthetic dialogues to train on.
        test: synthetic dialogues to test on.

    Raises:
        CorpusError: unknown name, or ``root`` is missing or not such a corpus.
    """
    if name.startswith(SYNTHETIC):
        sizes = {"train": train, "validation": VALIDATION, "test": test}
        return synthetic.build(name.removeprefix(SYNTHETIC), sizes)
    if name not in CORPORA or root is None:
        known = [SYNTHETIC + variant for variant in synthetic.VARIANTS]
        raise CorpusError(
            f"corpus is {name!r}, root is {root}; pass one of {known}, or one of {list(CORPORA)} "
            "with the directory where it is."
        )
    if name.startswith("iemocap"):
        corpus = iemocap.load(root, classes=6 if name.endswith("6") else 4)
        return corpus if fold is None else iemocap.fold(corpus, fold)
    if name == "meld":
        return meld.load(root, root / "wav")
    return {"multidialog": multidialog, "m3ed": m3ed}[name].load(root)


@dataclass(frozen=True)
class Bench:
    """A study is what the runs on one corpus share."""

    corpus: Corpus
    listener: Callable[[], Listener]
    encoded: dict[str, list[EncodedDialogue]]

    @property
    def speakers(self) -> int:
        """Most speakers of a dialogue."""
        return 1 + max(max(d.speaker) for split in self.encoded.values() for d in split)


def open_bench(
    settings: Settings,
    splits: Sequence[str] = ("train", "validation", "test"),
    *,
    test: int = TEST,
    on_turn: Callable[[int], object] = lambda turns: None,
    on_total: Callable[[int], object] = lambda turns: None,
) -> Bench:
    """Loads the corpus and the host of ``settings`` and encodes ``splits``.

    ``on_total`` is called with the number of turns to encode, ``on_turn`` with those done.
    """
    root = None if settings.root is None else Path(settings.root)
    corpus = open_corpus(
        settings.corpus, root, fold=settings.fold, train=settings.dialogues, test=test
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def listener() -> Listener:  # anew for every run: LoRA changes the model it is put into
        return load_listener(settings.host, corpus.labels, device=device)

    folder = None if settings.cache is None else Path(settings.cache)
    host, parts = listener(), {split: corpus.split(split) for split in splits}
    on_total(sum(len(d.turns) for part in parts.values() for d in part.dialogues))
    encoded = {
        split: encode_corpus(host, part, folder, on_turn=on_turn) for split, part in parts.items()
    }
    return Bench(corpus, listener, encoded)


def build(settings: Settings, bench: Bench) -> DialogueModel:
    """An untrained model of ``settings``.

    Raises:
        ArgumentError: unknown arm.
    """
    if settings.arm not in ARMS:
        raise ArgumentError(f"arm is {settings.arm!r}; pass one of {list(ARMS)}.")
    return new_model(
        bench.listener(),
        ARMS[settings.arm],
        seed=settings.seed,
        speakers=bench.speakers,
        lora=settings.lora,
        head_dim=settings.head_dim,
    )


def train_run(
    settings: Settings,
    bench: Bench,
    folder: Path,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> DialogueModel:
    """Trains and writes ``settings.json``, weights, and the adapter for :class:`MALAdapter`.

    Args:
        settings: of the run.
        bench: of the same corpus and host.
        folder: of the run.
        resume: go on from the last checkpoint in ``folder``.
        callbacks: of the Trainer, for progress bars.
        changes: of the Trainer's arguments.
    """
    model = build(settings, bench)
    settings.save(folder)
    if settings.checkpointing:
        model.checkpoint_activations()
    trainer = DialogueTrainer(
        model,
        arguments(settings, folder, **changes),
        bench.encoded["train"],
        bench.encoded["validation"],
        window=settings.window,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    if trainer.is_world_process_zero():
        save_run(model, settings, folder)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
    return model


def save_run(model: DialogueModel, settings: Settings, folder: Path) -> None:
    """Writes what :func:`load_run` reads."""
    settings.save(folder)
    write_tensors(folder / WEIGHTS, KIND, model.state_dict(), {})
    if isinstance(model.memory, TitansMemory):
        model.memory.mal.save_pretrained(folder / "adapter")


def load_run(folder: Path, bench: Bench) -> DialogueModel:
    """A trained model, in eval mode.

    Raises:
        CheckpointError: ``folder`` holds no run.
    """
    settings = Settings.load(folder)
    tensors, _ = read_tensors(folder / WEIGHTS, KIND)
    model = build(settings, bench)
    model.load_state_dict(tensors)
    return model.eval()


def for_arm(settings: Settings, arm: str) -> Settings:
    """Returns this budget for another arm."""
    return replace(settings, arm=arm, window=None if arm == "attention" else settings.window)
