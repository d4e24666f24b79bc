"""Makes the demo's weights from nothing: dialogues, a host, then a memory on the frozen host.

The memory acts on the host's input embeddings, which do not change, so they are computed once. The
loop over turns below is :func:`mal_kernels.memory.recall`, which :class:`mal_kernels.MALAdapter`
calls in hooks: ``tests/demo/test_demo.py`` holds the two to the same logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from mal_kernels.adapter import MALAdapter
from mal_kernels.config import MALConfig
from mal_kernels.demo import small_host
from mal_kernels.demo.data import CHUNK, Dialogues, make_dialogues
from mal_kernels.dialogues.files import read_tensors, write_tensors
from mal_kernels.errors import CheckpointError
from mal_kernels.memory import Clips, NeuralMemory, recall

if TYPE_CHECKING:
    from transformers import Qwen2AudioForConditionalGeneration

WEIGHTS = Path(__file__).parent / "weights"  # ships with the package
HOST_FILE, KIND = "host.safetensors", "demo host"
# of the dialogues for the host and for the memory, which must not lean on sounds that the host has
# learned by heart; the demo plays those of other seeds
HOST_SEED, MEMORY_SEED = 1, 555


@dataclass(frozen=True)
class Recipe:
    """How much of everything; the defaults made the weights that ship with the package.

    ``dialogues`` are made twice: some for the host, others for the memory.
    """

    dialogues: int = 1600
    host_steps: int = 4000
    memory_steps: int = 500
    seed: int = 0


def adapter_config() -> MALConfig:
    """A narrow linear memory: measured best here, and stable without a bound (keys are unit)."""
    return MALConfig(
        head_dim=16,
        depth=1,
        max_lr=2.0,
        lr_init=(0.1, 0.3, 0.6, 1.0),
        max_grad_norm=None,
        zero_start=True,
        hidden_size=small_host.WIDTH,
        base_model_name_or_path="mal_kernels.demo.host",
    )


def train(
    recipe: Recipe | None = None, *, workers: int = 2, bar: Progress | None = None
) -> tuple[Qwen2AudioForConditionalGeneration, MALAdapter]:
    """Make the host and the adapter from nothing; they are not attached to each other yet.

    Args:
        recipe: the shipped one if ``None``.
        workers: processes that render audio.
        bar: shows how far each stage is.
    """
    recipe, bar = recipe or Recipe(), bar or Progress(disable=True)

    def stage(title: str, total: int) -> Callable[[], None]:
        return functools.partial(bar.advance, bar.add_task(title, total=total))

    on_chunk = stage("Speaking", 2 * -(-recipe.dialogues // CHUNK))
    single, whole = (
        make_dialogues(seed + recipe.seed, recipe.dialogues, workers=workers, on_step=on_chunk)
        for seed in (HOST_SEED, MEMORY_SEED)
    )
    host = small_host.pretrain(
        single.script,
        single.features,
        steps=recipe.host_steps,
        seed=recipe.seed,
        on_step=stage("Pre-training the host on single turns", recipe.host_steps),
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe.seed)
        mal = MALAdapter(adapter_config())
    train_memory(
        mal.memory,
        host,
        whole,
        steps=recipe.memory_steps,
        seed=recipe.seed,
        on_step=stage("Training the memory on the frozen host", recipe.memory_steps),
    )
    return host, mal.requires_grad_(False)


def save(host: Qwen2AudioForConditionalGeneration, mal: MALAdapter, folder: Path) -> None:
    """Write host and adapter as safetensors, for :func:`load`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / HOST_FILE, KIND, host.state_dict(), {})
    mal.save_pretrained(folder)


def load(folder: Path | None = None) -> tuple[Qwen2AudioForConditionalGeneration, MALAdapter]:
    """Host and adapter, not attached; those that ship with the package if ``folder`` is ``None``.

    Raises:
        CheckpointError: the folder does not hold them, or they are damaged.
    """
    folder = folder or WEIGHTS
    path = folder / HOST_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; make the demo's weights with "
            f"`mal-kernels demo --train --out {folder}`."
        )
    host = small_host.build_host().requires_grad_(False)
    tensors, _ = read_tensors(path, KIND, lambda header: host.state_dict())
    host.load_state_dict(tensors)
    return host, MALAdapter.from_pretrained(folder)


@torch.no_grad()
def embed(host: Qwen2AudioForConditionalGeneration, features: Tensor) -> Tensor:
    """Returns what the decoder is given for the prompt of every turn, ``[N, T, S, Dm]``."""
    rows = [
        small_host.input_embeds(
            host, small_host.audio_tokens(host, mels), small_host.token_ids(len(mels))
        )
        for mels in features.flatten(0, 1).split(512)
    ]
    return torch.cat(rows).unflatten(0, features.shape[:2])


def remember(memory: NeuralMemory, embeds: Tensor, speaker: Tensor, speakers: int = 2) -> Tensor:
    """``embeds`` with each turn's audio tokens changed by what its speaker's memory recalls.

    Args:
        memory: read before and written after each turn.
        embeds: ``[N, T, S, Dm]``.
        speaker: int64 ``[N, T]``.
        speakers: number of speakers a dialogue can have.
    """
    dialogues, turns, length, _ = embeds.shape
    row, (start, stop, _) = torch.arange(dialogues), small_host.AUDIO.indices(length)
    starts, lengths = row * length + start, torch.full_like(row, stop - start)
    state = memory.initial_state(dialogues * speakers)
    changed = []
    for t in range(turns):
        clips = Clips.of(starts, lengths, row * speakers + speaker[:, t])
        hidden, (state, *_) = recall(memory, embeds[:, t], clips, state)
        changed.append(hidden)
    return torch.stack(changed, 1)


def answer_logits(host: Qwen2AudioForConditionalGeneration, embeds: Tensor) -> Tensor:
    """Logits of the answer for ``embeds`` ``[N, T, S, Dm]``: ``[N, T, len(WORDS)]``."""
    return small_host.answer_logits(host, embeds.flatten(0, 1)).unflatten(0, embeds.shape[:2])


def train_memory(
    memory: NeuralMemory,
    host: Qwen2AudioForConditionalGeneration,
    dialogues: Dialogues,
    *,
    steps: int = 600,
    batch: int = 32,
    lr: float = 2e-2,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train ``memory`` in place, through whole dialogues; returns the loss of every step."""
    embeds = embed(host, dialogues.features)
    speaker = torch.from_numpy(dialogues.script.speaker)
    answer = torch.tensor(small_host.answer_ids())[torch.from_numpy(dialogues.script.label)]
    optimizer = torch.optim.AdamW(memory.parameters(), lr=lr, weight_decay=0.0)
    schedule = small_host.cosine(optimizer, steps, warmup=30)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(embeds), (batch,), generator=draw)
        logits = answer_logits(host, remember(memory, embeds[rows], speaker[rows]))
        loss = F.cross_entropy(logits.flatten(0, 1), answer[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        on_step()
    return losses
