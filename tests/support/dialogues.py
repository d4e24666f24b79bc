"""A store of dialogues without a host, and what tests put into it."""

from __future__ import annotations

import torch

from mal_kernels import MALConfig, MemoryState, NeuralMemory
from mal_kernels.dialogues import Dialogue, DialogueStore
from mal_kernels.dialogues.snapshot import Snapshot

CONFIG = MALConfig(heads=2, head_dim=4, hidden_size=8, residual_norm=True)


def new_store(config: MALConfig = CONFIG, **options) -> DialogueStore:
    memory = NeuralMemory(8, step="chunk", chunk_size=None, **config.memory_options())
    return DialogueStore(config, memory.initial_state, **options)


def snapshot(store: DialogueStore, value: float, *who: str | None, clips=()) -> Snapshot:
    like = store.initial_state(1).detach()
    return Snapshot(
        {w: like.map(lambda t: torch.full_like(t, value)) for w in who or (None,)}, tuple(clips)
    )


def equal(a: MemoryState, b: MemoryState) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def dialogue_of(store: DialogueStore, *args, **options) -> Dialogue:
    """A dialogue of a store without an adapter: nothing can be called through it."""
    return Dialogue(store, *args, **options, scopes=None)
