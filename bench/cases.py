"""The cases are shapes, the inputs for them, and the work that every op must do there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

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
        """Counts a multiply and an add per term of each matrix product of the forward pass.

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
        """Counts what the forward pass must read and write once: q, k, v, y, gates, state."""
        per_token = 4 * self.head_dim + 3
        state = 2 * 2 * (2 * self.head_dim * self.hidden_dim)
        return 4 * self.batch * self.heads * (self.tokens * per_token + state)

    def leaves(self, step: Step) -> list[Tensor]:
        """q, k, v ``[B, T, H, D]``, the three gates, W1, W2, S1, S2; the same for every provider.

        Unit queries and keys and an lr of a hundredth keep the recurrence stable, so that agreement
        means something, and a decay of a thousandth keeps the memory of order one, so that nobody
        is timed on denormals; all of them ask for gradients.
        """
        B, T, H, D, E = self.batch, self.tokens, self.heads, self.head_dim, self.hidden_dim
        torch.manual_seed(0)
        q, k, v = torch.randn(3, B, T, H, D).unbind()
        gates = T if step == "token" else T // self.chunk_size
        lr, momentum, decay = torch.rand(B, T, H), torch.rand(B, gates, H), torch.rand(B, gates, H)
        w1, w2 = torch.randn(B, H, D, E) * D**-0.5, torch.randn(B, H, E, D) * E**-0.5
        s1, s2 = 0.01 * torch.randn_like(w1), 0.01 * torch.randn_like(w2)
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        leaves = [q, k, v, 0.01 * lr, momentum, 0.001 * decay, w1, w2, s1, s2]
        return [x.requires_grad_() for x in leaves]


# side by side with everything else there is
PEERS = (Case("base"), Case("short", tokens=128), Case("small-chunk", chunk_size=16))
DECODE = Case("decode", tokens=1)
# one size at a time; titans-pytorch and the naive loop keep something per token and parameter:
# beyond LARGE tokens · heads · features · hidden_dim they would need minutes, or all memory
SWEEPS = {
    "tokens": tuple(Case(f"T={t}", tokens=t) for t in (128, 256, 512, 1024, 2048, 4096)),
    "heads": tuple(Case(f"B·H={n}", batch=n, heads=1, tokens=128) for n in (1, 4, 16, 32, 64)),
    "features": tuple(
        Case(f"D={d}", tokens=128, head_dim=d, hidden_dim=2 * d) for d in (16, 32, 64, 128)
    ),
    "width": tuple(Case(f"E={e}", tokens=128, hidden_dim=e) for e in (64, 128, 256, 512)),
}
CASES = {c.name: c for c in (*PEERS, DECODE, *(c for sweep in SWEEPS.values() for c in sweep))}
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


Calls: TypeAlias = dict[str, Callable[..., Any]]  # by op; each takes the keyword ``backend``


@dataclass(frozen=True)
class OpCase:
    """An op at a real size, and the least work and traffic it can do it with."""

    op: str
    where: str
    flops: int
    bytes: int
    calls: Callable[[], Calls]  # makes the inputs

    @property
    def name(self) -> str:
        """Returns the case as it stands in the JSON."""
        return f"{self.op}, {self.where}"


@dataclass(frozen=True)
class Turn:
    """One turn of several dialogues at once, one after another along T, as the adapter makes it.

    With N tokens in all, H heads, R dialogues with states of ``4 H D E`` numbers (weights and
    momentum)::

        aligned_residual_read  2 N (3 Dm H D + 2 H D E) flops; hidden in and out, four matrices, W
        memory_update          2 N H 5 D E flops (three products, two of rank N);
                               k, v, lr and surprise, state in and out, and W_init
    """

    host: Host
    dialogues: int
    heads: int = 4
    D: int = 64
    E: int = 128

    def calls(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Calls:
        """The ops on random inputs, tokens and hidden states in ``dtype``."""
        torch.manual_seed(0)
        T, R, H, D, E, Dm = (*self._sizes(), self.host.hidden)
        n = R * T
        q, k, v = (normalize(x, dim=-1).to(device, dtype) for x in torch.randn(3, 1, n, H, D))
        weights = (torch.randn(R, H, D, E) * D**-0.5, torch.randn(R, H, E, D) * E**-0.5)
        state = MemoryState.from_weights(weights).to(device)
        lr, gate = torch.full((1, n, H), 0.3 / T), torch.full((1, R, H), 0.01)
        lr, gate, index = lr.to(device), gate.to(device), torch.arange(n, device=device)
        shapes = ((Dm,), (H * D, Dm), (H * D, Dm), (Dm, H * D))
        # the residual is as large as the hidden states, so that an error in it shows
        matrices = (torch.randn(*s) * s[-1] ** -0.5 for s in shapes)
        params = ops.ReadParams(*(x.to(device) for x in matrices))
        hidden = torch.randn(1, n, Dm).to(device, dtype)
        aligned = (hidden, index, index // T, state, params)
        ends = torch.arange(0, n + 1, T, device=device)
        write = partial(ops.memory_update, k, v, lr, gate, gate, state, step="chunk")
        return {
            "aligned_residual_read": partial(ops.aligned_residual_read, *aligned),
            "aligned_residual_read_": partial(ops.aligned_residual_read_, *aligned),
            "memory_read": partial(ops.memory_read, q, state, cu_seqlens=ends),
            "memory_update": partial(write, max_grad_norm=1.0, init=state.weights, cu_seqlens=ends),
        }

    def _sizes(self) -> tuple[int, int, int, int, int]:
        return self.host.tokens, self.dialogues, self.heads, self.D, self.E

    def ops(self) -> list[OpCase]:
        """Read and write."""
        T, R, H, D, E = self._sizes()
        n, inner, Dm = R * T, H * D, self.host.hidden
        memory = H * 2 * D * E  # numbers of one dialogue's weights
        read = 2 * n * (3 * Dm * inner + 2 * H * D * E)
        read_bytes = 4 * (2 * n * Dm + 3 * inner * Dm + R * memory)
        write_bytes = 4 * (n * H * (2 * D + 2) + 5 * R * memory)
        where = f"{self.host.name} ×{R}"
        return [
            OpCase("aligned_residual_read", where, read, read_bytes, self.calls),
            OpCase("memory_update", where, 2 * n * H * 5 * D * E, write_bytes, self.calls),
        ]


def layer_ops(case: Case) -> list[OpCase]:
    """The ops of a Titans layer at a training shape.

    ``neural_memory`` is :class:`Case`; of the others, with N tokens · heads::

        memory_read    2 N 2 D E flops; q, y and W
        momentum_scan  4 flops an element of the update [B, T, H, D]; reads it, writes S and W
    """

    def calls() -> Calls:
        q, k, v, lr, momentum, decay, w1, w2, s1, s2 = (x.detach() for x in case.leaves("token"))
        state = MemoryState((w1, w2), (s1, s2))
        layer = partial(ops.neural_memory, q, k, v, lr, momentum, decay, state)
        return {
            "neural_memory": partial(layer, chunk_size=case.chunk_size),
            "memory_read": partial(ops.memory_read, q, state),
            "momentum_scan": partial(ops.momentum_scan, k, momentum, decay),
        }

    rows, D, E = case.batch * case.heads, case.head_dim, case.hidden_dim
    n = rows * case.tokens
    where = f"B={case.batch} H={case.heads} T={case.tokens}"
    read_bytes = 4 * (2 * n * D + 2 * rows * D * E)
    return [
        OpCase("neural_memory", where, case.flops("token"), case.io_bytes(), calls),
        OpCase("memory_read", where, 2 * n * 2 * D * E, read_bytes, calls),
        OpCase("momentum_scan", where, 4 * n * D, 4 * (3 * n * D + 2 * n), calls),
    ]


# turns of real hosts, of one and of eight dialogues at once, and a training shape
OPS = {
    case.name: case
    for group in (
        *(Turn(host, n).ops() for host in HOSTS for n in (1, 8)),
        layer_ops(Case("training", batch=4, tokens=1024)),
    )
    for case in group
}


def tensors(result: Any) -> list[Tensor]:
    """The tensors in nested tuples."""
    if isinstance(result, tuple):
        return [x for part in result for x in tensors(part)]
    return [result] if isinstance(result, Tensor) else []
