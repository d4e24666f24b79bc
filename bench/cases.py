"""What is measured: shapes, the inputs for them, and how much work they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
        C, D, E = self.chunk_size, self.head_dim, self.hidden_dim
        per_chunk = 11 * C * D * E + 2 * C * C * (D + E) if step == "token" else 7 * C * D * E
        return 2 * self.batch * self.heads * (self.tokens // C) * per_chunk

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


CASES = {
    case.name: case
    for case in (
        Case("base"),
        Case("short", tokens=128),
        Case("batch", batch=4, tokens=128),
        Case("wide", hidden_dim=256, tokens=256),
        Case("small-chunk", chunk_size=16),
    )
}
