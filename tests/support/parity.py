"""For the tests of Triton kernels: where they run, and a function against its float64 golden.

Interpreted on a CPU (``TRITON_INTERPRET=1``), or on a GPU; without either they are skipped.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mal_kernels.testing import Inputs, assert_all_within_budget, low_precision

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs the interpreter, TRITON_INTERPRET=1, or a GPU", allow_module_level=True)

if INTERPRETED:
    from mal_kernels.testing import interpreter

    interpreter.install()

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(x, device):
    """Every tensor of a nested argument on ``device``."""
    if isinstance(x, (list, tuple)):
        parts = [moved(y, device) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    if isinstance(x, dict):
        return {name: moved(y, device) for name, y in x.items()}
    return x.to(device) if isinstance(x, torch.Tensor) else x


def values(function, tensors):
    """Outputs of ``function(*tensors)``."""
    out = function(*tensors)
    out = [out] if isinstance(out, torch.Tensor) else out
    return {f"output {i}": x for i, x in enumerate(out)}


def values_and_gradients(function, tensors):
    """Outputs of ``function(*tensors)`` and gradients of a fixed random loss over all of them."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    named = values(function, tensors)
    out = list(named.values())
    g = torch.Generator().manual_seed(1)
    noise = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in out]
    loss = sum((x * n).sum() for x, n in zip(out, noise, strict=True))
    grads = torch.autograd.grad(loss, tensors, materialize_grads=True, allow_unused=True)
    named = {n: x.detach() for n, x in named.items()}
    return named | {f"grad {i} {list(g.shape)}": g for i, g in enumerate(grads)}


def assert_same(function, golden_function, tensors, dtype, find=values_and_gradients):
    """``function`` on ``tensors`` within the budget of its dtype around the float64 golden."""
    high = find(golden_function, [t.double() for t in tensors])
    twin = None
    if dtype != torch.float32:
        with low_precision(dtype):
            twin = find(golden_function, [t.float() for t in tensors])
    assert_all_within_budget(find(function, tensors), high, twin, dtype)


def on_tensors(op: Callable, inputs: Inputs, **more):
    """``op``, of the signature of ``neural_memory``, as a function of ``inputs.tensors()``."""

    def function(*tensors):
        given = {id(old): new for old, new in zip(inputs.tensors(), tensors, strict=True)}
        *args, options = inputs.map(lambda t: given[id(t)])
        out = op(*args, **options, **more)
        return [out.output, out.surprise, *out.state.weights, *out.state.momentum]

    return function


class _Calls(TorchDispatchMode):
    """Counts the operators that compute; allocations, views and questions of type do not.

    Nor do the checks of values, which are made on a CPU alone.
    """

    IDLE = (
        *("empty", "new_empty", "promote_types", "aminmax", "_local_scalar_dense", "_unique"),
        *("view", "detach", "alias", "slice", "split", "unbind", "select", "unsqueeze", "expand"),
    )

    def __init__(self, count: Counter) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not name.startswith(self.IDLE) and "mal_kernels" not in str(func):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_launches() -> Iterator[Counter]:
    """Every kernel that runs inside, by name; interpreted, torch's operators stand for theirs."""
    count: Counter = Counter()
    if not INTERPRETED:
        torch.utils.deterministic.fill_uninitialized_memory = False  # each fill is a launch
        kind = torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[kind]) as found:
            yield count
            torch.cuda.synchronize()
        torch.utils.deterministic.fill_uninitialized_memory = True
        kernels = (e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        count.update(e.name for e in kernels)
        return
    from triton.runtime.interpreter import GridExecutor

    stock = GridExecutor.__call__

    def call(self, *args, **kwargs):
        count[self.fn.__name__] += 1
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own
            return stock(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", call), _Calls(count):
        yield count
