"""Calls of the CUDA kernels, on a GPU or in the emulation, and the inputs they are judged on."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from unittest import mock

import torch

from mal_kernels import MemoryState, ops
from mal_kernels._cuda import aligned_residual_read as launcher
from mal_kernels.ops import NeuralMemoryOutput
from mal_kernels.testing import make_inputs


def values_and_gradients(function, tensors):
    """Outputs of ``function`` and gradients of a fixed random loss, on the CPU."""
    tensors = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    out = function(**tensors)
    g = torch.Generator().manual_seed(1)
    noise = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in out]
    loss = sum((x * n.to(x)).sum() for x, n in zip(out, noise, strict=True))
    wanted = [*tensors.values()]  # a loop over no tokens uses none of them
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    named = {f"output {i}": x for i, x in enumerate(out)}
    named |= {f"grad {n}": d for n, d in zip(tensors, grads, strict=True)}
    return {n: x.detach().cpu() for n, x in named.items()}


def scan_tensors(
    tokens=37, features=(8,), heads=2, lengths=None, state=True, gates=("momentum", "decay"),
    edges=False,
):  # fmt: skip
    rows = batch = 2
    options = {}
    if lengths:
        rows, batch, tokens = len(lengths), 1, sum(lengths)
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = {"update": torch.randn(batch, tokens, heads, *features)}
    for name in gates:
        tensors[name] = torch.randn(batch, tokens, heads).sigmoid()
        if edges:
            tensors[name] = tensors[name].where(tensors[name] > 0.3, 0).where(
                tensors[name] < 0.7, 1
            )  # fmt: skip
    if state:
        tensors |= {n: torch.randn(rows, heads, *features) for n in ("weights", "trace")}
    return tensors, options


def scan(function, device="cpu", **options):
    """``function`` with its arguments by name, tokens on the CPU."""
    cu_seqlens = options.pop("cu_seqlens", None)

    def call(update, momentum=None, decay=None, weights=None, trace=None):
        state = None if weights is None else MemoryState((weights.to(device),), (trace.to(device),))
        tokens = [None if x is None else x.to(device) for x in (update, momentum, decay)]
        bounds = None if cu_seqlens is None else cu_seqlens.to(device)
        return function(*tokens, state, cu_seqlens=bounds, **options)

    return call


CASES = {
    "chunk steps": dict(chunk_size=16, step="chunk"),
    "token steps": dict(chunk_size=16),
    "a turn: two tiles, clip, init": dict(
        tokens=112, heads=1, hidden=128, chunk_size=None, step="chunk", max_grad_norm=1.0,
        init=True, max_lr=0.01,
    ),
    "chunks longer than a tile, init": dict(
        tokens=130, heads=1, hidden=100, chunk_size=100, init=True
    ),
    "norm, clip, odd sizes": dict(
        head_dim=48, hidden=71, chunk_size=32, residual_norm=True, max_grad_norm=0.5
    ),
    "ragged chunk steps, norm": dict(
        lengths=[5, 0, 70], chunk_size=32, step="chunk", residual_norm=True, activation="silu"
    ),
    "ragged, inside a chunk": dict(
        lengths=[5, 0, 70], head_dim=16, hidden=24, chunk_size=32, position=True, activation="relu"
    ),
    "inside a chunk, norm, init": dict(
        chunk_size=100, position=True, residual_norm=True, batch=2, init=True
    ),
    "linear": dict(depth=1, chunk_size=32),
    "linear, norm, clip": dict(
        depth=1, head_dim=40, chunk_size=32, residual_norm=True, max_grad_norm=0.5
    ),
    "128 features, four blocks": dict(
        tokens=70, heads=1, head_dim=128, hidden=100, chunk_size=100, activation="gelu_tanh"
    ),
    "16 blocks": dict(tokens=6, heads=1, head_dim=128, hidden=500, residual_norm=True),
    "linear, 128 features": dict(
        tokens=70, heads=1, head_dim=128, depth=1, chunk_size=64, step="chunk"
    ),
    "gates of 0 and 1": dict(chunk_size=16, edges=True),
    "no gates": dict(chunk_size=16, gates=False),
    "no tokens": dict(tokens=0, chunk_size=16),
}  # fmt: skip


def memory_inputs(dtype=torch.bfloat16, **case):
    sizes = dict(tokens=40, batch=1, heads=2, head_dim=64, hidden=64)
    return make_inputs(**(sizes | case), dtype=dtype)


def written(function, inputs, device="cpu", **more):
    """What a write returns, by name, on the CPU; an anchor where it will be read."""
    return called(lambda q, *rest, **options: function(*rest, **options), inputs, device, **more)


def called(function, inputs, device="cpu", **more):
    """Likewise of the layer, with what it reads."""
    *given, state, options = inputs
    moved = [None if x is None else x.to(device) for x in given]
    state = state.map(lambda x: x.to(device))
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor)
        else [w.to(device) for w in x] if name == "init" and x else x
        for name, x in options.items()
    }  # fmt: skip
    with torch.no_grad():
        out = function(*moved, state, **options, **more)
    named = {"surprise": out.surprise}
    if isinstance(out, ops.NeuralMemoryOutput):
        named["output"] = out.output
    for field in ("weights", "momentum", "anchor"):
        for i, w in enumerate(getattr(out.state, field) or ()):
            named[f"{field}[{i}]"] = w if field != "anchor" else w[out.state.position > 0]
    if out.state.position is not None:
        named["position"] = out.state.position.double()
    return {name: x.cpu() for name, x in named.items()}


def turn(
    dtype=torch.bfloat16, tokens=20, width=72, heads=2, dim=16, hidden=24, rows=2, depth=2,
    residual_norm=False, state="sorted", params=(torch.float32,) * 4, splits=None,
    activation="gelu",
):  # fmt: skip
    """Arguments of the op by name; the residual is larger than hidden, so that errors show.

    ``params`` are the dtypes of the parameters, None for that of ``hidden``; ``splits`` is for
    :func:`read`.
    """
    inner, places = heads * dim, 2 * tokens + 3
    unsorted = torch.randint(rows, (tokens,))
    index = {"sorted": unsorted.sort().values, "unsorted": unsorted}
    sizes = [dim, *[hidden] * (depth - 1), dim]
    weights = [torch.randn(rows, heads, a, b) / a**0.5 for a, b in pairwise(sizes)]
    if residual_norm:
        weights.append(0.3 * torch.randn(rows, heads, dim))
    shapes = [(inner, width), (inner, width), (width, inner)]
    matrices = [torch.randn(shape) / width**0.5 for shape in shapes[:2]]
    matrices.append(6 * torch.randn(shapes[2]) / inner**0.5)
    given = [torch.rand(width) + 0.5, *matrices]
    return dict(
        hidden=torch.randn(1, places, width).to(dtype),
        token_index=torch.randperm(places)[:tokens],
        state_index=torch.arange(tokens) if state == "one each" else index[state],
        weights=weights,
        params=[p.to(d or dtype) for p, d in zip(given, params, strict=True)],
        options=dict(activation=activation, residual_norm=residual_norm),
        splits=splits,
    )


def read(function, given, device="cpu", *, dtype=None, **more):
    """``function`` of a turn on ``device``, floats as ``dtype``; the result on the CPU."""

    def moved(x):
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    weights = [moved(w) for w in given["weights"]]
    return function(
        *(moved(given[name]) for name in ("hidden", "token_index", "state_index")),
        MemoryState(tuple(weights), tuple(weights)),
        ops.ReadParams(*map(moved, given["params"])),
        **given["options"],
        **more,
    ).cpu()


def cuda(given, device, function=ops.aligned_residual_read):
    splits = given["splits"]
    chosen = mock.patch.object(launcher, "parts", return_value=splits) if splits else nullcontext()
    with chosen:
        return read(function, given, device, backend="cuda")


def on(device, x):
    """``x``, or every tensor in it, on ``device``."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, (list, tuple)):
        parts = [on(device, y) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def layer_on(device, cuts=(), reads=True):
    """``neural_memory`` there, as a function for :func:`results`; one call between two cuts."""

    def layer(q, *rest, **options):
        *tokens, state = on(device, (q if reads else None, *rest))
        options = {name: on(device, x) for name, x in options.items()}
        outputs, surprises = [], []
        for begin, end in pairwise([0, *cuts, q.shape[1]]):
            given = (x[:, begin:end] if cuts and x is not None else x for x in tokens)
            output, state, surprise = ops.neural_memory(*given, state, **options, backend="cuda")
            outputs.append(output.cpu())
            surprises.append(surprise.cpu())
        if cuts:  # all of them together end with a chunk
            state = state.end_chunk()
        output = torch.cat(outputs, 1) if reads else q.new_empty(0)
        return NeuralMemoryOutput(output, on("cpu", state), torch.cat(surprises, 1))

    return layer


def write_on(device, cuts=()):
    """Likewise of a write, without queries."""
    return layer_on(device, cuts, reads=False)


def gradient_inputs(dtype=torch.bfloat16, **case):
    """Gates are float32, for float16 would lose their smallest gradients, below 6e-5."""
    inputs = memory_inputs(dtype, **case)
    gates = [None if gate is None else gate.float() for gate in inputs[3:6]]
    return inputs._replace(lr=gates[0], momentum=gates[1], decay=gates[2])
