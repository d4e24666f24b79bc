"""Training over dialogues with ``transformers.Trainer``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..dialogues.files import read_tensors, write_tensors
from ..errors import CheckpointError
from .host import EncodedDialogue
from .metrics import summary
from .model import DialogueModel
from .scoring import score_dialogues
from .stream import RankSampler, WindowLoader

SETTINGS = "settings.json"
CARRIED = "carried state"


@dataclass(frozen=True)
class Settings:
    """Settings are what a run needs to be repeated; saved as ``settings.json``.

    Attributes:
        corpus: ``synthetic:<variant>`` or the name of a corpus.
        root: its directory, for real ones.
        arm: a key of :data:`mal_kernels.ser.memories.ARMS`.
        host: the demo, or a model id.
        fold: which session of IEMOCAP is the test.
        seed: of weights and of the order of dialogues.
        steps: of the optimizer.
        batch: dialogues per step and process.
        accumulation: steps of which the gradients are added up.
        window: turns through which gradients flow; ``None``: whole dialogues.
        lr: highest learning rate.
        warmup: steps.
        evaluate_every: steps between validations.
        head_dim: width of a head of the memory.
        lora: rank of LoRA beside the memory.
        bf16: autocast to bfloat16.
        checkpointing: recompute the decoder's activations.
        dialogues: size of the synthetic training set.
        cache: folder for the encoded turns.
    """

    corpus: str = "synthetic:baseline"
    root: str | None = None
    arm: str = "gated-speaker"
    host: str = "demo"
    fold: int = 5
    seed: int = 0
    steps: int = 500
    batch: int = 32
    accumulation: int = 1
    window: int | None = None
    lr: float = 2e-2
    warmup: int = 30
    evaluate_every: int = 100
    head_dim: int = 16
    lora: int | None = None
    bf16: bool = False
    checkpointing: bool = False
    dialogues: int = 2000
    cache: str | None = None

    def save(self, folder: Path) -> None:
        """Writes ``settings.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Reads them again.

        Raises:
            CheckpointError: ``folder`` holds no run.
        """
        path = folder / SETTINGS
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; train a run there first.")
        return cls(**json.loads(path.read_text()))


class _CarriedState(TrainerCallback):  # type: ignore[misc]
    """Keeps what the memories hold in the middle of dialogues with every checkpoint."""

    def __init__(self, model: DialogueModel) -> None:
        self.model = model

    @staticmethod
    def path(folder: Path, rank: int) -> Path:
        return folder / f"carried-{rank}.safetensors"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.model.carried is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {str(i): t for i, t in enumerate(self.model.carried)}
            write_tensors(self.path(folder, args.process_index), CARRIED, tensors, {})

    def restore(self, folder: Path, rank: int) -> None:
        path = self.path(folder, rank)
        if path.exists():
            tensors, _ = read_tensors(path, CARRIED)
            self.model.carried = tuple(tensors[str(i)] for i in range(len(tensors)))


class DialogueTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose batches are windows of dialogues and whose validation is by dialogue.

    Args:
        model: what to train.
        args: as always.
        dialogues: to train on.
        validation: to choose the best checkpoint by.
        window: turns through which gradients flow; ``None``: whole dialogues.
    """

    def __init__(
        self,
        model: DialogueModel,
        args: TrainingArguments,
        dialogues: Sequence[EncodedDialogue],
        validation: Sequence[EncodedDialogue],
        window: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.dialogue_model, self.validation = model, validation
        longest = max(len(d.turns) for d in dialogues)
        self.window = min(window or longest, longest)
        model.keeps_state = self.window < longest
        self.carried = _CarriedState(model)
        super().__init__(
            model,
            args,
            train_dataset=dialogues,
            eval_dataset=validation,
            callbacks=[self.carried, *callbacks],
        )
        self.remove_callback(PrinterCallback)  # the log is in the checkpoints; a bar shows progress

    def get_train_dataloader(self) -> WindowLoader:
        """This rank's windows. Not handed to accelerate, which would deal them out again."""
        args = self.args
        lengths = [len(dialogue.turns) for dialogue in self.train_dataset]
        rows = args.per_device_train_batch_size
        sampler = RankSampler(
            lengths, rows, self.window, args.process_index, args.world_size, args.seed
        )
        return WindowLoader(self.train_dataset, sampler)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the validation dialogues, whole and in order, on every rank alike."""
        carried, self.dialogue_model.carried = self.dialogue_model.carried, None
        scored = score_dialogues(self.model, self.validation)
        self.dialogue_model.carried = carried
        found = summary(scored.labels, scored.probabilities)
        metrics = {
            "eval_loss": float(-np.log(scored.likelihood_of_labels.clip(1e-12)).mean()),
            "eval_accuracy": found["WA"],
            "eval_macro_f1": found["macro-F1"],
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args,
            self.state,
            self.control,  # type: ignore[has-type]
            metrics,
        )
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.carried.restore(Path(resume_from_checkpoint), self.args.process_index)


def arguments(settings: Settings, folder: Path, **changes: Any) -> TrainingArguments:
    """The Trainer's arguments of a run."""
    options = dict(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        max_grad_norm=1.0,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=max(1, min(20, settings.steps // 10)),
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        save_strategy="steps",
        save_steps=settings.evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
        greater_is_better=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=True,  # what the last turns write is read by nobody
        average_tokens_across_devices=True,
        report_to="none",
        disable_tqdm=True,
    )
    return TrainingArguments(**{**options, **changes})
