"""Implementations of the layer, ready to be called on a case, and whether they agree.

Providers with the same steps do the same work. Token steps are the paper's: gates per token, every
token reads its own memory. Chunk steps (gates per chunk, late reads) are less work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import LARGE, Case, Step, size
from mal_kernels.ops import neural_memory
from mal_kernels.state import MemoryState
from mal_kernels.testing.plain import Op, by_autograd, closed_form, lean_form


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Args:
        library: what it is.
        step: what one step is; providers with the same steps do the same work.
        build: the op for a case.
        largest: :func:`bench.cases.size` beyond which it is not run.
    """

    library: str
    step: Step
    build: Callable[[Case], Op]
    largest: float = float("inf")

    @property
    def name(self) -> str:
        """The name is how the provider stands in tables and JSON."""
        return f"{self.library} ({self.step} steps)"

    def runs(self, case: Case) -> bool:
        """Not too large, and with chunk steps no chunk left open."""
        whole = self.step == "token" or case.tokens % case.chunk_size == 0
        return whole and size(case) <= self.largest


# --- libraries ----------------------------------------------------------------------------------


def ours(step: Step, backend: str = "auto") -> Callable[[Case], Op]:
    """The registered operator."""

    def build(case: Case) -> Op:
        def op(*arguments: Any) -> tuple[Tensor, MemoryState]:
            options: Any = {"chunk_size": case.chunk_size, "step": step, "backend": backend}
            result = neural_memory(*arguments, **options)
            return result.output, result.state

        return op

    return build


def plain(step: Step) -> Callable[[Case], Op]:
    """A loop of autograd."""
    return lambda case: by_autograd(case.chunk_size, step)


def titans_pytorch(step: Step) -> Callable[[Case], Op]:
    """titans-pytorch, driven as an op."""

    def build(case: Case) -> Op:
        from mal_kernels.testing.oracles import TitansPytorch

        return TitansPytorch(
            heads=case.heads,
            head_dim=case.head_dim,
            hidden_dim=case.hidden_dim,
            chunk_size=case.chunk_size,
            step=step,
        )

    return build


OURS = Provider("mal_kernels", "token", ours("token"))
THEIRS = Provider("titans-pytorch", "token", titans_pytorch("token"), LARGE)
LOOP = Provider("PyTorch, token loop", "token", plain("token"), LARGE // 2)
EAGER = Provider("PyTorch, closed form", "token", lambda case: closed_form(case.chunk_size))
COMPILED = Provider(
    "torch.compile, closed form", "token", lambda case: closed_form(case.chunk_size, True)
)
LEAN = Provider("torch.compile, lean closed form", "token", lambda case: lean_form(case.chunk_size))
OURS_CHUNK = Provider("mal_kernels", "chunk", ours("chunk"))
THEIRS_CHUNK = Provider("titans-pytorch", "chunk", titans_pytorch("chunk"))
AUTOGRAD = Provider("PyTorch, autograd per chunk", "chunk", plain("chunk"))
PROVIDERS = {
    p.name: p
    for p in (OURS, THEIRS, LOOP, EAGER, COMPILED, LEAN, OURS_CHUNK, THEIRS_CHUNK, AUTOGRAD)
}
SWEPT = (OURS, THEIRS, EAGER, OURS_CHUNK, THEIRS_CHUNK)  # over every size
SLOW = (LOOP, COMPILED, LEAN)  # minutes: on the base case only


# --- ready to call ------------------------------------------------------------------------------


class Workload:
    """An op on the inputs of a case, ready to be called again and again."""

    def __init__(self, provider: Provider, case: Case) -> None:
        self.op = provider.build(case)
        self.leaves = case.leaves(provider.step)
        generator = torch.Generator().manual_seed(1)
        self.output_grad = torch.randn(self.leaves[0].shape, generator=generator)
        if provider.step == "chunk":
            # there, titans-pytorch lets a chunk's last token see its own chunk: leave it out
            self.output_grad[:, case.chunk_size - 1 :: case.chunk_size] = 0

    def run(self) -> tuple[Tensor, MemoryState]:
        """The op on the inputs, with a graph unless under ``torch.no_grad``."""
        *tensors, w1, w2, s1, s2 = self.leaves
        return self.op(*tensors, MemoryState((w1, w2), (s1, s2)))

    def forward(self) -> None:
        """The op alone."""
        with torch.no_grad():
            self.run()

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Gradients of all ten inputs; the loss weighs the output and the whole final state."""
        output, state = self.run()
        loss = (output * self.output_grad).sum()
        loss = loss + sum((x * x).sum() for x in (*state.weights, *state.momentum))
        return torch.autograd.grad(loss, self.leaves)


def agreement(work: Workload, other: Workload) -> dict[str, float]:
    """Largest relative error of outputs and of gradients, not more than float32 rounding.

    Raises:
        AssertionError: it is more: they do different work, or one of them is wrong.
    """
    seen = work.output_grad != 0
    found = []
    for each in (work, other):
        with torch.no_grad():
            output, state = each.run()
        found.append((output[seen], *state.weights, *state.momentum))
    forward = max(map(relative_error, *found))
    gradients = max(map(relative_error, work.forward_backward(), other.forward_backward()))
    if not (forward <= 1e-5 and gradients <= 1e-4):  # false for NaN
        raise AssertionError(f"outputs differ by {forward:.1e}, gradients by {gradients:.1e}")
    return {"forward": forward, "gradients": gradients}


def checked(provider: Provider, case: Case) -> tuple[Workload, dict[str, float]]:
    """A provider on a case, and its errors against the reference.

    Raises:
        AssertionError: it does not agree.
    """
    judge = Provider("reference", provider.step, ours(provider.step, "reference"))
    work = Workload(provider, case)
    return work, agreement(Workload(judge, case), work)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
