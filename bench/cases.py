"""What is measured: shapes, the inputs for them, and how much work every op must do there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mal_kernels import MemoryState, ops

Step = Literal["token", "chunk"]


@dataclass(frozen=True)
class Case:
    """One shape of the causal memory layer with a two-layer MLP memory, float32."""

    name: str
    batch: int = 1
    heads: int = 4
    tokens: int = 512
    head_dim: int = 64
    hidden_dim: int = 128
    chunk_size: int = 64

    def flops(self, step: Step) -> int:
        """Of the forward pass: a multiply and an add per term of each matrix product.

        Per chunk of C tokens and head, with D and E: the write's three products and two updates
        (of weights and of momentum: four) and the read's two products per state it reads from.
        Token steps add what the queries see of their own chunk, C² (D + E) twice.
        """
        D, E = self.head_dim, self.hidden_dim
        total = 0
        for start in range(0, self.tokens, self.chunk_size):
            C = min(self.chunk_size, self.tokens - start)
            total += 11 * C * D * E + 2 * C * C * (D + E) if step == "token" else 7 * C * D * E
        return 2 * self.batch * self.heads * total

    def io_bytes(self) -> int:
        """What the forward pass must read and write once: q, k, v, y, gates, state in and out."""
        per_token = 4 * self.head_dim + 3
        state = 2 * 2 * (2 * self.head_dim * self.hidden_dim)
        return 4 * self.batch * self.heads * (self.tokens * per_token + state)

    def leaves(self, step: Step) -> list[Tensor]:
        """q, k, v ``[B, T, H, D]``, the three gates, W1, W2, S1, S2; the same for every provider.

        Unit queries and keys and an lr of a hundredth keep the recurrence stable, so that agreement
        means something; all of them ask for gradients.
        """
        B, T, H, D, E = self.batch, self.tokens, self.heads, self.head_dim, self.hidden_dim
        torch.manual_seed(0)
        q, k, v = torch.randn(3, B, T, H, D).unbind()
        gates = T if step == "token" else T // self.chunk_size
        lr, momentum, decay = torch.rand(B, T, H), torch.rand(B, gates, H), torch.rand(B, gates, H)
        w1, w2 = torch.randn(B, H, D, E) * D**-0.5, torch.randn(B, H, E, D) * E**-0.5
        s1, s2 = 0.01 * torch.randn_like(w1), 0.01 * torch.randn_like(w2)
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        leaves = [q, k, v, 0.01 * lr, momentum, 0.05 * decay, w1, w2, s1, s2]
        return [x.requires_grad_() for x in leaves]


# side by side with what else there is
CASES = (Case("base"), Case("short", tokens=128), Case("small-chunk", chunk_size=16))
DECODE = Case("decode", tokens=1)

# one size at a time; titans-pytorch and the naive loop keep something per token and parameter:
# beyond LARGE tokens · heads · features · hidden_dim they would need minutes, or all memory
BY_TOKENS = tuple(Case(f"T={t}", tokens=t) for t in (128, 256, 512, 1024, 2048, 4096))
BY_HEADS = tuple(Case(f"B·H={n}", batch=n, heads=1, tokens=128) for n in (1, 4, 16, 32, 64))
BY_FEATURES = tuple(
    Case(f"D={d}", tokens=128, head_dim=d, hidden_dim=2 * d) for d in (16, 32, 64, 128)
)
BY_WIDTH = tuple(Case(f"E={e}", tokens=128, hidden_dim=e) for e in (64, 128, 256, 512))
LARGE = 1024 * 4 * 64 * 128


def size(case: Case) -> int:
    """Tokens · heads · features · hidden_dim: what a copy of the memory per token would hold."""
    return case.batch * case.heads * case.tokens * case.head_dim * case.hidden_dim


@dataclass(frozen=True)
class Host:
    """A published audio language model: what one turn of 4.5 s of audio is to it.

    Args:
        name: of the model.
        hidden: width ``Dm`` of its decoder.
        layers: of the decoder.
        tokens: audio tokens of the turn.
        cache_bytes: key-value cache per token, bf16.
    """

    name: str
    hidden: int
    layers: int
    tokens: int
    cache_bytes: int


HOSTS = (
    Host("GLM-ASR-Nano", 2048, 28, 56, 56 * 1024),
    Host("Qwen3-ASR-1.7B", 2048, 28, 58, 112 * 1024),
    Host("Voxtral-Mini-3B", 3072, 30, 375, 120 * 1024),
    Host("Audio Flamingo 3", 3584, 28, 112, 56 * 1024),
    Host("Qwen2.5-Omni-7B", 3584, 28, 112, 56 * 1024),
    Host("Qwen2-Audio-7B", 4096, 32, 112, 512 * 1024),
)


@dataclass(frozen=True)
class OpCase:
    """An op at a real size: the call, and the least work and traffic it can do it with."""

    op: str
    where: str
    flops: int
    bytes: int
    call: Callable[[], object]

    def bound_ms(self, rates: dict[str, float]) -> float:
        """The time that the device needs for the arithmetic or for the traffic, the longer one."""
        return 1e3 * max(
            self.flops / (1e9 * rates["float32_gflop_per_s"]),
            self.bytes / (1e9 * rates["copy_gb_per_s"]),
        )


def turn_ops(host: Host, dialogues: int, heads: int = 4, D: int = 64, E: int = 128) -> list[OpCase]:
    """Read and write of one turn of ``dialogues`` dialogues at once, as the adapter makes them.

    With N tokens in all, H heads, R = dialogues states of ``4 H D E`` numbers (weights, momentum)::

        aligned_residual_read  2 N (3 Dm H D + 2 H D E) flops; hidden in and out, four matrices, W
        memory_update          2 N H 5 D E flops (three products, two of rank N);
                               k, v, lr and surprise, state in and out, and W_init
    """
    torch.manual_seed(0)
    n, inner, T, R = dialogues * host.tokens, heads * D, host.tokens, dialogues
    k, v = (normalize(torch.randn(1, n, heads, D), dim=-1) for _ in range(2))
    weights = (torch.randn(R, heads, D, E) * D**-0.5, torch.randn(R, heads, E, D) * E**-0.5)
    state = MemoryState.from_weights(weights)
    lr = torch.full((1, n, heads), 0.3 / T)
    gate = torch.full((1, R, heads), 0.01)
    ends = torch.arange(0, n + 1, T)
    hidden, index = torch.randn(1, n, host.hidden), torch.arange(n)
    shapes = ((host.hidden,), (inner, host.hidden), (inner, host.hidden), (host.hidden, inner))
    params = ops.ReadParams(*(0.02 * torch.randn(*s) for s in shapes))
    memory = heads * 2 * D * E  # numbers of one dialogue's weights
    where = f"{host.name} ×{dialogues}"
    return [
        OpCase(
            "aligned_residual_read",
            where,
            2 * n * (3 * host.hidden * inner + 2 * heads * D * E),
            4 * (2 * n * host.hidden + 3 * inner * host.hidden + R * memory),
            lambda: ops.aligned_residual_read(hidden, index, index // T, state, params),
        ),
        OpCase(
            "memory_update",
            where,
            2 * n * heads * 5 * D * E,
            4 * (n * heads * (2 * D + 2) + 5 * R * memory),
            lambda: ops.memory_update(
                *(k, v, lr, gate, gate, state),
                step="chunk",
                max_grad_norm=1.0,
                init=weights,
                cu_seqlens=ends,
            ),
        ),
    ]


def layer_ops(case: Case) -> list[OpCase]:
    """The ops of a Titans layer at a training shape.

    ``neural_memory`` is :class:`Case`; of the others, with N tokens · heads::

        memory_read    2 N 2 D E flops; q, y and W
        momentum_scan  4 flops an element of the update [B, T, H, D]; reads it, writes S and W
    """
    q, k, v, lr, momentum, decay, w1, w2, s1, s2 = (x.detach() for x in case.leaves("token"))
    state = MemoryState((w1, w2), (s1, s2))
    tokens = case.batch * case.heads * case.tokens
    where = f"B={case.batch} H={case.heads} T={case.tokens}"

    def layer() -> object:
        return ops.neural_memory(
            q, k, v, lr, momentum, decay, state, chunk_size=case.chunk_size
        )  # fmt: skip

    return [
        OpCase("neural_memory", where, case.flops("token"), case.io_bytes(), layer),
        OpCase(
            "memory_read",
            where,
            2 * tokens * 2 * case.head_dim * case.hidden_dim,
            4 * (2 * q.numel() + w1.numel() + w2.numel()),
            lambda: ops.memory_read(q, state),
        ),
        OpCase(
            "momentum_scan",
            where,
            4 * k.numel(),
            4 * (3 * k.numel() + 2 * tokens),
            lambda: ops.momentum_scan(k, momentum, decay),
        ),
    ]


def op_cases(
    hosts: Sequence[Host], dialogues: Sequence[int], layers: Sequence[Case]
) -> list[OpCase]:
    """Turns of real hosts, one and several dialogues at once, and training shapes."""
    turns = [case for host in hosts for n in dialogues for case in turn_ops(host, n)]
    return turns + [op for case in layers for op in layer_ops(case)]
