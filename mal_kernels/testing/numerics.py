"""A parity test needs inputs in the stable regime, the float64 golden, and error budgets.

Every kernel is judged against :func:`mal_kernels.reference.recurrence` in float64:

* Tier 0, algebra: float32 without TF32. RMS error ≤ 1e-5 of the golden's RMS and max error ≤ 2e-5
  of its max; gradients 1e-4 and 2e-4.
* Tier 1, precision: bf16 and fp16, judged by a *twin*, the reference with the operands of every
  matrix product rounded to that dtype: max error ≤ 2·(twin's + eps·max|golden|) and
  RMS error ≤ 2·twin's + ½·eps·RMS(golden).

Fixed tolerances pass kernels that reset momentum at every chunk; these do not: see
``tests/ops/test_teeth.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import reference
from .._torch.neural_memory import memory_fwd
from ..call import MemoryCall, n_chunks
from ..state import MemoryState, NeuralMemoryOutput


class Inputs(NamedTuple):
    """Arguments of :func:`mal_kernels.ops.neural_memory`; ``options`` are its keyword arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    decay: Tensor | None
    state: MemoryState
    options: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """The float tensors, in order: tokens, gates, state, then ``init``."""
        given = [*self[:6], *self.state.tensors(), *(self.options.get("init") or ())]
        return [t for t in given if t is not None and t.is_floating_point()]

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """Returns the arguments with ``f`` applied to every float tensor."""

        def apply(x: Any) -> Any:
            if isinstance(x, MemoryState):
                return x.map(lambda t: f(t) if t.is_floating_point() else t)
            if isinstance(x, (list, tuple)):
                return [apply(t) for t in x]
            return f(x) if isinstance(x, Tensor) and x.is_floating_point() else x

        options = {name: apply(value) for name, value in self.options.items()}
        return Inputs._make([*(apply(x) for x in self[:7]), options])

    def to(self, dtype: torch.dtype) -> Inputs:
        """Tokens and gates in ``dtype``, state and init in its state dtype."""
        cast = self.map(lambda t: t.to(torch.promote_types(dtype, torch.float32)))
        low = [None if x is None else x.to(dtype) for x in cast[:6]]
        return Inputs._make([*low, *cast[6:]])


def make_inputs(
    *,
    batch: int = 2,
    tokens: int = 23,
    heads: int = 2,
    head_dim: int = 8,
    hidden: int = 12,
    depth: int = 2,
    chunk_size: int | None = 8,
    step: str = "token",
    residual_norm: bool = False,
    activation: str = "gelu",
    max_grad_norm: float | None = None,
    init: bool = False,
    lengths: Sequence[int] | None = None,
    position: bool = False,
    gates: bool = True,
    edges: bool = False,
    max_lr: float = 0.05,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Random arguments in the stable regime: unit keys and queries, small write rates.

    The sizes and options are those of :func:`mal_kernels.ops.neural_memory`. ``init``, ``gates``
    and ``position`` say whether init, momentum and decay are given and whether each row starts at
    another place inside a chunk; ``lengths`` makes ragged sequences and replaces ``batch`` and
    ``tokens``; ``edges`` sets some momenta and decays to exactly 0 and 1.

    Example:
        >>> from mal_kernels import ops
        >>> from mal_kernels.testing import make_inputs
        >>> *args, options = make_inputs(tokens=5)
        >>> ops.neural_memory(*args, **options).output.shape
        torch.Size([2, 5, 2, 8])
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows, n = batch, n_chunks(tokens, chunk_size)
    options: dict[str, Any] = dict(
        chunk_size=chunk_size,
        step=step,
        activation=activation,
        residual_norm=residual_norm,
        max_grad_norm=max_grad_norm,
    )
    if lengths is not None:
        rows, batch, tokens = len(lengths), 1, sum(lengths)
        n = sum(n_chunks(length, chunk_size) for length in lengths)
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    if step == "token":
        n = tokens

    q, k, v = (F.normalize(normal(batch, tokens, heads, head_dim), dim=-1) for _ in range(3))
    lr = max_lr * normal(batch, tokens, heads).sigmoid()
    momentum, decay = normal(2, batch, n, heads).sigmoid() * torch.tensor([0.95, 0.3]).view(
        2, 1, 1, 1
    )
    if edges:
        for gate in (momentum, decay):
            pick = torch.rand(gate.shape, generator=g)
            gate[pick < 0.15], gate[pick > 0.85] = 0.0, 1.0
    dims = [head_dim, *[hidden] * (depth - 1), head_dim]
    shapes = [(rows, heads, a, b) for a, b in pairwise(dims)]
    weights = [normal(*s) / s[2] ** 0.5 for s in shapes]
    if residual_norm:
        weights.append(0.1 * normal(rows, heads, head_dim))
    if init:
        options["init"] = [w + 0.1 * normal(*w.shape) for w in weights]
    state = MemoryState(tuple(weights), tuple(0.05 * normal(*w.shape) for w in weights))
    if position:
        assert chunk_size is not None, "position: a whole call is one chunk"
        anchor = tuple(w + 0.1 * normal(*w.shape) for w in weights)
        state = state._replace(anchor=anchor, position=torch.arange(rows) * 3 % chunk_size)
    rates = (momentum, decay) if gates else (None, None)
    return Inputs._make([q, k, v, lr, *rates, state, options]).to(dtype)


def closed_form(*args: Any, **options: Any) -> NeuralMemoryOutput:
    """The memory as the portable backend computes it, outside of the operator.

    Arguments and result are those of :func:`mal_kernels.ops.neural_memory`; nothing is checked.
    Autograd goes through it and :class:`low_precision` sees its products, so it is the twin.
    """
    *tokens, state = args
    return NeuralMemoryOutput.of(*memory_fwd(MemoryCall.of(tokens, state, **options)))


# matrix products; the factors are their last positional arguments
PRODUCTS = [getattr(torch.ops.aten, f).default for f in ("mm", "bmm", "addmm", "baddbmm")]


class low_precision(TorchDispatchMode):
    """Rounds the operands of every matrix product to ``dtype``: what tensor cores are given.

    Example:
        >>> import torch
        >>> from mal_kernels.testing import low_precision
        >>> with low_precision(torch.bfloat16):
        ...     torch.full((1, 1), 1.001) @ torch.ones(1, 1)
        tensor([[1.]])
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in PRODUCTS:
            added, factors = args[:-2], args[-2:]
            args = (*added, *(x.to(self.dtype).to(x.dtype) for x in factors))
        return func(*args, **(kwargs or {}))


def assert_within_budget(
    name: str,
    actual: Tensor,
    golden: Tensor,
    *,
    gradient: bool = False,
    twin: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Tier 0 (``twin=None``) or Tier 1 of the module's policy.

    Args:
        name: named in the failure, with the share of each budget used.
        actual: what the kernel returned.
        golden: float64, from the rounded inputs.
        gradient: Tier 0 allows gradients ten times the error.
        twin: the low-precision reference's result.
        dtype: precision of the twin.

    Raises:
        AssertionError: a budget is exceeded, or ``actual`` is not finite or of another shape.
    """
    assert actual.shape == golden.shape, f"{name}: {actual.shape} is not {golden.shape}"
    if golden.numel() == 0:
        return
    golden = golden.double()
    error = actual.double() - golden
    largest, rms = golden.abs().max(), _rms(golden)
    if twin is None:
        slack = 10 if gradient else 1
        budget_max, budget_rms = slack * 2e-5 * largest, slack * 1e-5 * rms
    else:
        eps, twin_error = torch.finfo(dtype).eps, twin.double() - golden
        budget_max = 2 * (twin_error.abs().max() + eps * largest)
        budget_rms = 2 * _rms(twin_error) + 0.5 * eps * rms
    tiny = torch.finfo(torch.float64).tiny
    used = float(error.abs().max() / (budget_max + tiny)), float(_rms(error) / (budget_rms + tiny))
    ok = all(share <= 1 for share in used)  # false for NaN
    assert ok, f"{name}: max error {used[0]:.2f} of budget, RMS error {used[1]:.2f} of budget"


def assert_all_within_budget(
    actual: dict[str, Tensor],
    golden: dict[str, Tensor],
    twin: dict[str, Tensor] | None,
    dtype: torch.dtype,
) -> None:
    """:func:`assert_within_budget` of results by name; names of gradients begin with ``grad``."""
    for name, x in actual.items():
        assert_within_budget(
            name,
            x,
            golden[name],
            gradient=name.startswith("grad"),
            twin=None if twin is None else twin[name],
            dtype=dtype,
        )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def results(function: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Every output of ``function`` and every gradient of a fixed random loss over all outputs.

    The loss is ``Σ ⟨output, noise⟩`` over output, surprise, weights, momentum and anchor, so that
    the gradient through the final state is exercised too.
    """
    inputs = inputs.map(lambda t: t.detach().clone().requires_grad_())
    *args, options = inputs
    out = function(*args, **options)
    named = {"output": out.output, "surprise": out.surprise}
    for field in ("weights", "momentum", "anchor"):
        for i, w in enumerate(getattr(out.state, field) or ()):
            named[f"{field}[{i}]"] = w
    g = torch.Generator().manual_seed(1)
    noise = {n: torch.randn(x.shape, generator=g, dtype=torch.float64) for n, x in named.items()}
    if out.state.position is not None:
        # at position 0 the anchor is not read, and what stands there is no result
        inside = (out.state.position > 0).double()
        for n in named:
            if n.startswith("anchor"):
                named[n] = named[n] * inside.to(named[n].dtype).view(-1, *[1] * (named[n].ndim - 1))
    loss = sum((x * noise[n].to(x.dtype)).sum() for n, x in named.items() if x.numel())
    tensors = inputs.tensors()
    grads = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    values = {n: x.detach() for n, x in named.items()}
    return values | {
        f"grad {i} {list(t.shape)}": g for i, (t, g) in enumerate(zip(tensors, grads, strict=True))
    }


def assert_parity(function: Callable[..., Any], inputs: Inputs) -> None:
    """``function`` (the signature of ``neural_memory``) against the golden, values and gradients.

    The tier follows from the dtype of ``inputs``: float32 is Tier 0, bf16 and fp16 are Tier 1.

    Example:
        >>> import torch
        >>> from mal_kernels import ops
        >>> from mal_kernels.testing import assert_parity, make_inputs
        >>> assert_parity(ops.neural_memory, make_inputs(dtype=torch.float32))
    """
    dtype = inputs.k.dtype
    golden = results(reference.recurrence, inputs.to(torch.float64))
    twin = None
    if dtype != torch.float32:
        with low_precision(dtype):
            twin = results(closed_form, inputs.to(torch.float32))
    assert_all_within_budget(results(function, inputs), golden, twin, dtype)
