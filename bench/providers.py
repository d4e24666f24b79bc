"""Implementations of the layer, ready to be called on a case, and whether they agree.

Providers with the same steps do the same work. Token steps are the paper's: gates per token, every
token reads its own memory. Chunk steps (gates per chunk, late reads) are less work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import LARGE, Case, Step, size
from mal_kernels.ops import neural_memory
from mal_kernels.state import MemoryState

Op: TypeAlias = Callable[..., tuple[Tensor, MemoryState]]  # of q, k, v, three gates and the state


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
        """As it stands in tables and JSON."""
        return f"{self.library} ({self.step} steps)"

    def runs(self, case: Case) -> bool:
        """Not too large, and with chunk steps no chunk left open."""
        whole = self.step == "token" or case.tokens % case.chunk_size == 0
        return whole and size(case) <= self.largest


# --- plain PyTorch, as one would write it -------------------------------------------------------


def _loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
    """``‖M(k) − v‖²`` ``[G, C]`` for tokens ``[G, C, D]`` and weights ``[G, ...]``."""
    w1, w2 = weights
    return (F.gelu(k @ w1) @ w2 - v).square().sum(-1)


def _inner_gradient(
    weights: tuple[Tensor, ...], k: Tensor, v: Tensor, lr: Tensor
) -> tuple[Tensor, ...]:
    """``Σ lr ∇loss`` by autograd; differentiable if gradients are wanted outside."""
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        at = weights if outer else tuple(w.detach().requires_grad_() for w in weights)
        total = (lr * _loss(at, k, v)).sum()
        return torch.autograd.grad(total, at, create_graph=outer)


def _per_head(function: Callable[..., tuple[list[Tensor], Any, Any]]) -> Op:
    """Rows and heads in one dimension ``G``, and back: q, k, v ``[G, T, D]``, gates ``[G, n]``."""

    def op(*arguments: Any) -> tuple[Tensor, MemoryState]:
        *tokens, state = arguments
        batch, _, heads = tokens[0].shape[:3]
        folded = [x.transpose(1, 2).flatten(0, 1) for x in tokens]
        fast = [tuple(w.flatten(0, 1) for w in field) for field in state[:2]]
        outputs, *fields = function(*folded, *fast)
        y = torch.cat(outputs, 1).unflatten(0, (batch, heads)).transpose(1, 2)
        weights, momentum = (
            tuple(w.unflatten(0, (batch, heads)) for w in field) for field in fields
        )
        return y, MemoryState(weights, momentum)

    return op


def token_loop(case: Case) -> Op:
    """The recurrence as it is written: a gradient by autograd for every token."""

    def run(q, k, v, lr, momentum, decay, w, s):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        outputs = []
        for t in range(q.shape[1]):
            at, one = slice(t, t + 1), (slice(None), t, None, None)
            if t % case.chunk_size == 0:
                anchor = w
            g = _inner_gradient(anchor, k[:, at], v[:, at], lr[:, at])
            s = tuple(momentum[one] * a - b for a, b in zip(s, g, strict=True))
            w = tuple((1 - decay[one]) * a + b for a, b in zip(w, s, strict=True))
            outputs.append(F.gelu(q[:, at] @ w[0]) @ w[1])
        return outputs, w, s

    return _per_head(run)


def chunk_autograd(case: Case) -> Op:
    """Chunk steps with one call of autograd a chunk."""

    def run(q, k, v, lr, momentum, decay, w, s):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        outputs = []
        for c, start in enumerate(range(0, q.shape[1], case.chunk_size)):
            at, one = slice(start, start + case.chunk_size), (slice(None), c, None, None)
            outputs.append(F.gelu(q[:, at] @ w[0]) @ w[1])
            g = _inner_gradient(w, k[:, at], v[:, at], lr[:, at])
            s = tuple(momentum[one] * a - b for a, b in zip(s, g, strict=True))
            w = tuple((1 - decay[one]) * a + b for a, b in zip(w, s, strict=True))
        return outputs, w, s

    return _per_head(run)


def _closed_chunk(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor, decay: Tensor,
    w1: Tensor, w2: Tensor, s1: Tensor, s2: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One chunk ``[G, C, D]`` in closed form: the output, and the four fast weights after it."""
    below = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril(-1)

    def products(gate: Tensor) -> Tensor:  # [G, C, C]: gate_{s+1} … gate_t
        return torch.where(below, gate.unsqueeze(-1), 1.0).cumprod(-2).tril()

    decays, momenta = products(1 - decay), products(momentum)
    w = (decays @ momenta) * lr.unsqueeze(-2)
    beta, e0 = (1 - decay).cumprod(-1).unsqueeze(-1), momentum.cumprod(-1).unsqueeze(-1)
    f = decays @ e0
    z = k @ w1
    h = F.gelu(z)
    d2 = 2 * (h @ w2 - v)
    d1 = torch.ops.aten.gelu_backward(d2 @ w2.mT, z)
    zq = F.gelu(beta * (q @ w1) + f * (q @ s1) - (w * (q @ k.mT)) @ d1)
    y = beta * (zq @ w2) + f * (zq @ s2) - (w * (zq @ h.mT)) @ d2
    b, c, e = beta[:, -1:], f[:, -1:], e0[:, -1:]
    of_w, of_s = w[:, -1].unsqueeze(-1), (momenta[:, -1] * lr).unsqueeze(-1)
    return (
        y,
        b * w1 + c * s1 - (of_w * k).mT @ d1,
        b * w2 + c * s2 - (of_w * h).mT @ d2,
        e * s1 - (of_s * k).mT @ d1,
        e * s2 - (of_s * h).mT @ d2,
    )


def closed_form(case: Case, compiled: bool = False) -> Op:
    """The closed form in plain PyTorch, differentiated by autograd; its chunk compiled if asked."""
    advance = torch.compile(_closed_chunk, dynamic=False) if compiled else _closed_chunk

    def run(q, k, v, lr, momentum, decay, w, s):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        outputs, fast = [], [*w, *s]
        for start in range(0, q.shape[1], case.chunk_size):
            at = slice(start, start + case.chunk_size)
            tokens = (x[:, at].contiguous() for x in (q, k, v, lr, momentum, decay))
            y, *fast = advance(*tokens, *fast)
            outputs.append(y)
        return outputs, fast[:2], fast[2:]

    return _per_head(run)


# --- libraries ----------------------------------------------------------------------------------


def ours(step: Step) -> Callable[[Case], Op]:
    """The registered operator, with the backend that ``auto`` takes."""

    def build(case: Case) -> Op:
        def op(*arguments: Any) -> tuple[Tensor, MemoryState]:
            result = neural_memory(*arguments, chunk_size=case.chunk_size, step=step)
            return result.output, result.state

        return op

    return build


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
LOOP = Provider("PyTorch, token loop", "token", token_loop, LARGE // 2)
EAGER = Provider("PyTorch, closed form", "token", closed_form)
COMPILED = Provider("torch.compile, closed form", "token", lambda case: closed_form(case, True))
OURS_CHUNK = Provider("mal_kernels", "chunk", ours("chunk"))
THEIRS_CHUNK = Provider("titans-pytorch", "chunk", titans_pytorch("chunk"))
AUTOGRAD = Provider("PyTorch, autograd per chunk", "chunk", chunk_autograd)
# the first of each step is what the others must agree with
PROVIDERS = (OURS, THEIRS, LOOP, EAGER, COMPILED, OURS_CHUNK, THEIRS_CHUNK, AUTOGRAD)


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


class Disagreement(AssertionError):
    """Two implementations of the same work have different results."""


def agreement(ours: Workload, theirs: Workload) -> dict[str, float]:
    """Largest relative error of outputs and of gradients.

    Raises:
        Disagreement: one of them is not float32 rounding.
    """
    seen = ours.output_grad != 0
    found = []
    for work in (ours, theirs):
        with torch.no_grad():
            output, state = work.run()
        found.append((output[seen], *state.weights, *state.momentum))
    forward = max(map(relative_error, *found))
    backward = max(map(relative_error, ours.forward_backward(), theirs.forward_backward()))
    if not (forward <= 1e-5 and backward <= 1e-4):  # false for NaN
        raise Disagreement(f"outputs differ by {forward:.1e}, gradients by {backward:.1e}")
    return {"forward": forward, "gradients": backward}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def neighbours() -> dict[str, str]:
    """Other fused layers that do different work, and why they are not run here.

    flash-linear-attention's kernels are called once, so that the reason is their own.
    """
    q, k, v = torch.randn(3, 1, 64, 2, 64).unbind()
    gate = torch.rand(1, 64, 2)
    reasons = {"ThunderKittens TTT-MLP": "needs a Hopper GPU"}
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.ttt import chunk_ttt_linear
    except Exception as error:
        return reasons | {"flash-linear-attention": _first_line(error)}
    calls: dict[str, Callable[[], Any]] = {
        "fla chunk_gated_delta_rule": lambda: chunk_gated_delta_rule(q, k, v, -gate, gate),
        "fla chunk_ttt_linear": lambda: chunk_ttt_linear(
            q, k, v, torch.ones(2, 64), torch.zeros(2, 64), gate.unsqueeze(-1)
        ),
    }
    for name, call in calls.items():
        try:
            call()
            reasons[name] = "runs, but does other work than the layer"
        except Exception as error:
            reasons[name] = _first_line(error)
    return reasons


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
