"""The write: next state and surprise, no read.

Five of the eleven products of :mod:`~mal_kernels.ops.neural_memory` with chunk steps, seven with
token steps. The registered operator is shared with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..state import MemoryState, MemoryUpdate
from .neural_memory import neural_memory


def memory_update(
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    state: MemoryState,
    *,
    chunk_size: int | None = None,
    step: str = "token",
    activation: str = "gelu",
    residual_norm: bool = False,
    max_grad_norm: float | None = None,
    init: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> MemoryUpdate:
    """Writes ``k → v`` into the memory.

    Arguments, errors and the returned ``state`` and ``surprise`` are those of
    :func:`mal_kernels.ops.neural_memory`, without ``q`` and ``output``.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from mal_kernels import MemoryState, ops
        >>> k, v = (normalize(torch.randn(1, 20, 2, 16), dim=-1) for _ in range(2))
        >>> lr, gate = torch.full((1, 20, 2), 0.05), torch.full((1, 2, 2), 0.01)
        >>> weights = (torch.randn(2, 2, 16, 32) / 4, torch.randn(2, 2, 32, 16) / 6)
        >>> state, surprise = ops.memory_update(  # two turns of 8 and 12 tokens, one step each
        ...     k, v, lr, gate, gate, MemoryState.from_weights(weights),
        ...     step="chunk", cu_seqlens=torch.tensor([0, 8, 20]), init=weights,
        ... )
        >>> surprise.shape
        torch.Size([1, 20, 2])
    """
    _, new, surprise = neural_memory(
        *(None, k, v, lr, momentum, decay, state),
        chunk_size=chunk_size,
        step=step,
        activation=activation,
        residual_norm=residual_norm,
        max_grad_norm=max_grad_norm,
        init=init,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return MemoryUpdate(new, surprise)
