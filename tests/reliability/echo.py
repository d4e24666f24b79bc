"""A host that only passes on what it is given: every position of its input is audio."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mal_kernels import HostSpec, MALAdapter, MALConfig, register_host
from mal_kernels.store import KeyValueStore

WIDTH = 16
CONFIG = MALConfig(heads=2, head_dim=8, hidden_size=WIDTH)

register_host(
    HostSpec(
        "echo",
        audio_inputs=("inputs_embeds",),
        audio_token=None,
        streaming=True,
        decoder=lambda model: model,
        min_clip_tokens=1,
    )
)


class Echo(nn.Module):
    """Returns its input; ``between`` runs after the memory was read, where a host does its work."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="echo", hidden_size=WIDTH)
        self.weight = nn.Parameter(torch.zeros(1))
        self.between: Callable[[], object] = lambda: None

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """``[B, T, WIDTH]`` as it is."""
        self.between()
        return inputs_embeds


def echo_adapter(
    backing: KeyValueStore | None = None, max_dialogues: int | None = None
) -> tuple[Echo, MALAdapter]:
    """A host with an adapter whose memory has an effect; the same weights every time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        mal = MALAdapter(CONFIG).requires_grad_(False)
        assert mal.memory is not None
        nn.init.normal_(mal.memory.to_out.weight)
    host = Echo()
    mal.attach(host)
    mal.dialogues.backing, mal.dialogues.max_dialogues = backing, max_dialogues
    return host, mal


def turn_tokens(dialogue: int, turn: int) -> Tensor:
    """What is said in a turn, float32 ``[1, 4 to 12, WIDTH]``, the same every time."""
    draw = torch.Generator().manual_seed(dialogue * 1_000_003 + turn)
    tokens = int(torch.randint(4, 13, (), generator=draw))
    return torch.randn(1, tokens, WIDTH, generator=draw)
