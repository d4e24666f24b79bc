"""Independent implementations, driven as functions of given q, k, v, gates and state.

What is compared (and timed) is the memory alone: the projections that titans-pytorch owns are
replaced by slices of its input. Needs ``titans-pytorch``, and ``flash-linear-attention`` for its
function only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict
from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.neural_memory import NeuralMemState
from torch import Tensor, nn

from mal_kernels.state import MemoryState

Step = Literal["token", "chunk"]


class _Apply(nn.Module):
    """A function in the place of a projection."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class _Gate:
    """A gate that is a probability already: titans-pytorch calls ``.sigmoid()`` on every gate.

    Going through a logit would lose the exact 0 and 1, and their gradients.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sigmoid(self) -> Tensor:
        return self.value


class TitansPytorch:
    """titans-pytorch's ``NeuralMemory`` with the signature of ``mal_kernels.ops.neural_memory``.

    ``step="token"`` is its ``chunk_size=1, batch_size=chunk_size``: gates per token, gradients at
    the chunk's start, every token reads its own memory; the same recurrence as ours.
    ``step="chunk"`` is its ``chunk_size=batch_size``: the write equals ours, and so does every read
    but that of a chunk's last token, which there sees its own chunk already.

    Its loss is the mean over features where ours is the sum, so ``lr`` is multiplied by D here.

    Args:
        heads: H.
        head_dim: D.
        hidden_dim: E, the width of the memory's hidden layers (unused for ``depth=1``).
        depth: number of weight matrices of the memory.
        chunk_size: tokens between two refreshes of the weights that gradients are taken at.
        step: ``"token"`` or ``"chunk"``.
        residual_norm: wrap the memory as ``x + (1 + gamma) * LayerNorm(mlp(x))``.

    Example:
        >>> import torch
        >>> from mal_kernels.state import MemoryState
        >>> op = TitansPytorch(heads=2, head_dim=4, hidden_dim=8, chunk_size=3)
        >>> q, k, v = torch.randn(3, 1, 6, 2, 4).unbind()
        >>> lr = momentum = decay = torch.full((1, 6, 2), 0.1)
        >>> weights = (torch.randn(1, 2, 4, 8), torch.randn(1, 2, 8, 4))
        >>> state = MemoryState(weights, tuple(map(torch.zeros_like, weights)))
        >>> output, state = op(q, k, v, lr, momentum, decay, state)
        >>> output.shape
        torch.Size([1, 6, 2, 4])
    """

    def __init__(
        self,
        *,
        heads: int,
        head_dim: int,
        hidden_dim: int,
        depth: int = 2,
        chunk_size: int,
        step: Step = "token",
        residual_norm: bool = False,
    ) -> None:
        self.heads, self.head_dim = heads, head_dim
        self.gate_chunk = 1 if step == "token" else chunk_size
        self.memory = NeuralMemory(
            heads * head_dim,
            dim_head=head_dim,
            heads=heads,
            chunk_size=self.gate_chunk,
            batch_size=chunk_size,
            model=MemoryMLP(head_dim, depth, expansion_factor=hidden_dim / head_dim),
            mem_model_norm_add_residual=residual_norm,
            pre_rmsnorm=False,
            adaptive_step_transform=lambda lr: lr * head_dim,
        )
        self._replace_projections()
        # γ comes first in its parameter list and last in ours
        names = self.memory.memory_model_parameter_names
        self.names = [*names[1:], names[0]] if residual_norm else names

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        momentum: Tensor,
        decay: Tensor,
        state: MemoryState,
    ) -> tuple[Tensor, MemoryState]:
        """Read and write all tokens.

        Args:
            q: queries ``[B, T, H, D]``; T a multiple of the chunk if ``step="chunk"``, and T >= 2.
            k: keys, likewise.
            v: values, likewise.
            lr: ``[B, T, H]``.
            momentum: ``[B, T, H]``, or ``[B, T / chunk_size, H]`` if ``step="chunk"``.
            decay: as ``momentum``.
            state: at a chunk boundary.

        Returns:
            The output ``[B, T, H, D]`` and the next state.
        """
        batch, tokens = q.shape[:2]
        momentum, decay = (g.repeat_interleave(self.gate_chunk, 1) for g in (momentum, decay))
        # [B, T, 3·H·D + 3·H]; the slices are taken out again where the projections used to be
        sequence = torch.cat([x.flatten(2) for x in (q, k, v, lr, momentum, decay)], dim=-1)
        output, end = self.memory(sequence, state=self._to_peer(state))
        output = output.view(batch, tokens, self.heads, self.head_dim)
        return output, self._from_peer(end, batch)

    def to(self, device: torch.device | str) -> TitansPytorch:
        """Move what the library keeps for itself; the tensors of a call stay where they are."""
        self.memory.to(device)
        return self

    def _replace_projections(self) -> None:
        memory, heads, inner = self.memory, self.heads, self.heads * self.head_dim

        def take(start: int, width: int) -> Callable[[Tensor], Tensor]:
            return lambda x: x[..., start : start + width]

        def gate(index: int) -> Callable[[Tensor], Tensor]:  # [B, T, ...] -> [B·H, T]
            part = take(3 * inner + index * heads, heads)
            return lambda x: part(x).transpose(1, 2).flatten(0, 1)

        lr, momentum, decay = gate(0), gate(1), gate(2)
        memory.to_queries = _Apply(take(0, inner))
        memory.to_keys = _Apply(take(inner, inner))
        memory.to_values = _Apply(take(2 * inner, inner))
        memory.to_adaptive_step = _Apply(lr)
        memory.to_momentum = _Apply(lambda x: _Gate(momentum(x)[None, ..., None]))  # first order
        memory.to_decay_factor = _Apply(lambda x: _Gate(decay(x)[..., None]))
        memory.retrieve_gate = None
        memory.combine_heads = nn.Identity()

    def _to_peer(self, state: MemoryState) -> NeuralMemState:
        weights = self._named(state.weights)
        momentum = self._named(state.momentum).apply(lambda m: m[None], batch_size=[])
        return NeuralMemState(0, weights, None, (weights, momentum), None)

    def _named(self, tensors: Sequence[Tensor]) -> TensorDict:
        """Per layer [B, H, ...] to name -> [B·H, ...]."""
        return TensorDict({n: t.flatten(0, 1) for n, t in zip(self.names, tensors, strict=True)})

    def _from_peer(self, state: NeuralMemState, batch: int) -> MemoryState:
        weights, momentum = state.states

        def split(x: Tensor) -> Tensor:
            return x.view(batch, self.heads, *x.shape[1:])

        return MemoryState(
            tuple(split(weights[n]) for n in self.names),
            tuple(split(momentum[n][0]) for n in self.names),
        )


def fla_momentum_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    state: MemoryState,
) -> tuple[Tensor, MemoryState]:
    """flash-linear-attention's recurrence, float32: ours for one linear layer and ``chunk_size=1``.

    Its momentum has the opposite sign, its rate ``eta`` is 2·lr, and ``momentum`` and ``1 - decay``
    enter as logarithms (so neither may be 0).

    Args:
        q: queries ``[B, T, H, D]``.
        k: keys ``[B, T, H, D]``.
        v: values ``[B, T, H, D]``.
        lr: ``[B, T, H]``.
        momentum: ``[B, T, H]`` in (0, 1].
        decay: ``[B, T, H]`` in [0, 1).
        state: one layer ``[B, H, D, D]``.

    Returns:
        The output ``[B, T, H, D]`` and the next state.
    """
    from fla.ops.momentum_delta_rule.naive import recurrent_momentum_delta_rule_ref

    output, final = recurrent_momentum_delta_rule_ref(
        q,
        k,
        v,
        log_alpha=torch.log1p(-decay),
        log_mu=momentum.log(),
        p=k,
        beta=torch.ones_like(lr),
        eta=2 * lr,
        scale=1.0,
        initial_S=state.weights[0],
        initial_M=-state.momentum[0],
        output_final_state=True,
    )
    return output, MemoryState((final[0],), (-final[1],))
