"""The steps of a GPU session that need the device, each in a process of its own.

``python -m bench.gpu_steps STEP OUT`` writes what it finds to the JSON file OUT as it goes, so that
a step that is stopped loses only what it had not finished. Before an op is timed, its results are
compared with the reference on the kind of inputs that are timed; see :mod:`bench.gpu` for what a
session is made of.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import normalize

from bench import providers
from bench.cases import Case, Step
from bench.gpu_clock import Stopwatch
from bench.measure import Functions
from mal_kernels import MemoryState, ops
from mal_kernels.testing import make_inputs

# relative RMS error against the reference, which computes in float32 whatever the inputs
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
TURN, AUDIO_HEADS, HOST_WIDTH = 112, 4, 4096  # tokens of a turn, heads, hidden size of a host


@dataclass
class Bench:
    """Where a step runs, how large, and where its results go."""

    out: Path
    device: str = "cuda"

    def __post_init__(self) -> None:
        self.results: dict[str, Any] = {}
        self.watch = Stopwatch(self.device)

    @property
    def is_real(self) -> bool:
        """Not a dry run."""
        return self.device == "cuda"

    def record(self, name: str, **values: Any) -> None:
        """Adds to the entry ``name`` and writes all entries."""
        self.results.setdefault(name, {}).update(values)
        scratch = self.out.with_suffix(".part")
        scratch.write_text(json.dumps(self.results))
        scratch.replace(self.out)

    def case(self, name: str, **sizes: int) -> Case:
        """A shape of the causal layer with D=64, E=256 and chunks of 64; tiny in a dry run."""
        if self.is_real:
            return Case(name, hidden_dim=256, **sizes)
        return Case(name, batch=1, heads=1, tokens=16, head_dim=16, hidden_dim=16, chunk_size=16)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal on the device."""
        return torch.randn(*shape, device=self.device).to(dtype)


def assert_close(name: str, pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> float:
    """Relative RMS error of the worst pair (found, expected); raises beyond :data:`TOLERANCE`."""
    errors = [float((a.double() - b).norm() / b.double().norm()) for a, b in pairs if b.any()]
    worst = max((e if e == e else float("inf") for e in errors), default=0.0)
    if worst > TOLERANCE[dtype]:
        raise AssertionError(f"{name}: error {worst:.1e}, at most {TOLERANCE[dtype]:.0e} expected")
    return worst


# --- what the card can do -------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """bf16 matrix product on random data, and a device-to-device copy, bytes read and written."""
    n, words = (8192, 2**30) if bench.is_real else (64, 2**10)
    a, b = (bench.randn(n, n, dtype=torch.bfloat16) for _ in range(2))
    ms = bench.watch.in_turns({"matmul": lambda: a @ b})["matmul"]
    bench.record("ceilings", tflops=2 * n**3 / ms["median"] / 1e9, matmul_ms=ms)
    source, target = torch.ones(2, words, device=bench.device)
    ms = bench.watch.in_turns({"copy": lambda: target.copy_(source)})["copy"]
    bench.record("ceilings", gigabytes_per_s=8 * words / ms["median"] / 1e6, copy_ms=ms)


# --- the causal layer -----------------------------------------------------------------------------


class DeviceWorkload(providers.Workload):
    """A case on the device, tokens in ``dtype``, with any implementation of the op."""

    def __init__(
        self, op: providers.Op, case: Case, bench: Bench,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.op, leaves = op, case.leaves("token")
        dtypes = [dtype] * 3 + [torch.float32] * (len(leaves) - 3)
        self.leaves = [
            x.detach().to(bench.device, d).requires_grad_()
            for x, d in zip(leaves, dtypes, strict=True)
        ]
        self.output_grad = torch.randn_like(self.leaves[0])


def layer(case: Case, backend: str) -> providers.Op:
    """The op of a backend."""

    def op(*arguments: Any) -> tuple[Tensor, MemoryState]:
        out = ops.neural_memory(*arguments, chunk_size=case.chunk_size, backend=backend)
        return out.output, out.state

    return op


def compiled_closed_form(bench: Bench, case: Case) -> providers.Op:
    """Plain PyTorch, the chunk compiled (not in a dry run), products in bf16 by autocast."""
    op = providers.closed_form(case, compiled=bench.is_real)

    def autocast(*arguments: Any) -> tuple[Tensor, MemoryState]:
        with torch.autocast(bench.device, torch.bfloat16):
            return op(*arguments)

    return autocast


def check_layer(bench: Bench, case: Case, dtype: torch.dtype) -> float:
    """Output, state and gradients of a few chunks of the case, Triton against the reference."""
    short = replace(case, batch=min(case.batch, 8), tokens=min(case.tokens, 5 * case.chunk_size))
    found = []
    for backend in ("triton", "reference"):
        work = DeviceWorkload(layer(short, backend), short, bench, dtype)
        torch.manual_seed(1)
        work.output_grad = bench.randn(*work.output_grad.shape, dtype=dtype)
        with torch.no_grad():
            output, state = work.run()
        found.append([output, *state.tensors(), *work.forward_backward()])
    return assert_close("neural_memory", list(zip(*found, strict=True)), dtype)


def time_layer(
    bench: Bench,
    case: Case,
    step: Step,
    works: Mapping[str, providers.Workload],
    dtype: torch.dtype,
) -> None:
    """Forward, then forward and backward, then peak memory, of every provider that can run it."""
    bench.record(
        case.name,
        op="neural_memory",
        dtype=str(dtype),
        features=case.head_dim,
        tokens=case.batch * case.tokens,
        shape=asdict(case),
        forward_tflop=case.flops(step) / 1e12,
    )
    able = {n: w for n, w in works.items() if _runs(bench, case.name, n, w.forward_backward)}
    forward = bench.watch.in_turns({n: w.forward for n, w in able.items()})
    bench.record(case.name, forward_ms=forward)
    both = bench.watch.in_turns({n: w.forward_backward for n, w in able.items()})
    bench.record(case.name, forward_backward_ms=both)
    peaks = {n: bench.watch.peak_bytes(w.forward_backward) for n, w in able.items()}
    bench.record(case.name, peak_bytes=peaks)


def _runs(bench: Bench, case: str, provider: str, function: Callable[[], object]) -> bool:
    """Whether it fits the memory; if not, the results say so."""
    try:
        function()
        return True
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        unable = bench.results[case].get("unable", {})
        bench.record(case, unable=unable | {provider: "out of memory"})
        return False


def train(bench: Bench) -> None:
    """The training shape of the targets: 256 heads in all, 4096 tokens."""
    case = bench.case("train", batch=64, tokens=4096)
    bench.record("train", relative_error=check_layer(bench, case, torch.bfloat16))
    works = {
        name: DeviceWorkload(layer(case, name), case, bench, torch.bfloat16)
        for name in ("triton", "reference")
    }
    time_layer(bench, case, "token", works, torch.bfloat16)
    states = 2 * 4 * case.batch * case.heads * 2 * case.head_dim * case.hidden_dim
    bench.record("train", saved_state_bytes=case.tokens // case.chunk_size * states)


def closed_form(bench: Bench) -> None:
    """Against plain PyTorch, its chunk compiled."""
    case = bench.case("closed form", batch=64, tokens=1024)
    bench.record("closed form", relative_error=check_layer(bench, case, torch.bfloat16))
    torch.set_default_device(bench.device)
    works = {
        "triton": DeviceWorkload(layer(case, "triton"), case, bench, torch.bfloat16),
        "torch.compile": DeviceWorkload(
            compiled_closed_form(bench, case), case, bench, torch.bfloat16
        ),
    }
    with torch.no_grad():
        ours, theirs = (work.run()[0] for work in works.values())
    error = assert_close("closed form", [(theirs, ours)], torch.bfloat16)
    bench.record("closed form", disagreement=error)
    time_layer(bench, case, "token", works, torch.bfloat16)


def peer(bench: Bench) -> None:
    """Against titans-pytorch at the same work, found equal in float32 before it is timed."""
    from bench.peers import TitansPytorch

    case = bench.case("peer", batch=4, tokens=1024)
    theirs = TitansPytorch(
        heads=case.heads,
        head_dim=case.head_dim,
        hidden_dim=case.hidden_dim,
        chunk_size=case.chunk_size,
    ).to(bench.device)
    short = replace(case, batch=1, tokens=2 * case.chunk_size)
    a, b = (
        DeviceWorkload(op, short, bench, torch.float32) for op in (layer(short, "triton"), theirs)
    )
    b.output_grad = a.output_grad
    bench.record("peer", agreement=providers.agreement(a, b))
    torch.set_float32_matmul_precision("high")
    bench.record("peer", float32_matmuls="TF32", titans_pytorch_dtype="torch.float32")
    works = {
        "triton": DeviceWorkload(layer(case, "triton"), case, bench, torch.bfloat16),
        "titans-pytorch": DeviceWorkload(theirs, case, bench, torch.float32),
    }
    time_layer(bench, case, "token", works, torch.bfloat16)


# --- a turn of a dialogue, a token of a stream ----------------------------------------------------


def read_hidden(bench: Bench) -> None:
    """From host hidden states to host hidden states, as the adapter reads; timed in place."""
    _time_turns(bench, "read_hidden", "aligned_residual_read", _aligned, _aligned_in_place)


def read(bench: Bench) -> None:
    """The read alone."""
    _time_turns(bench, "read", "memory_read", _read, _read)


def write(bench: Bench) -> None:
    """One chunk step, as the adapter writes."""
    _time_turns(bench, "write", "memory_update", _update, _update)


def _time_turns(
    bench: Bench, step: str, op: str, checked: Callable[..., list[Tensor]],
    timed: Callable[..., list[Tensor]],
) -> None:  # fmt: skip
    """One turn of 112 audio tokens, of 1 and of 32 dialogues at once."""
    for dialogues in (1, 32) if bench.is_real else (1, 2):
        arguments = _turn(bench, dialogues)
        functions = (functools.partial(f, **arguments) for f in (checked, timed))
        tokens: Tensor = arguments["tokens"]
        _time_latency(bench, f"{step} ×{dialogues}", op, tokens, *functions)


def decode(bench: Bench) -> None:
    """One token per dialogue, written and read."""
    for rows in (1, 32, 256) if bench.is_real else (1,):
        case = replace(bench.case("decode"), batch=rows, tokens=1)
        q, k, v, *gates, w1, w2, s1, s2 = (x.detach() for x in case.leaves("token"))
        tokens = [x.to(bench.device, torch.bfloat16) for x in (q, k, v)]
        gates = [x.to(bench.device) for x in gates]
        state = MemoryState((w1, w2), (s1, s2), (w1, w2), torch.ones(rows, dtype=torch.int64))
        state = state.to(bench.device)

        def op(
            backend: str,
            tokens: list[Tensor] = tokens,
            gates: list[Tensor] = gates,
            state: MemoryState = state,
        ) -> list[Tensor]:
            inputs: Any = (*tokens, *gates, state)
            out = ops.neural_memory(*inputs, chunk_size=64, backend=backend)
            return [out.output, *out.state.tensors()]

        _time_latency(bench, f"decode ×{rows}", "neural_memory", tokens[0], op, op)


def _time_latency(
    bench: Bench, name: str, op: str, tokens: Tensor, checked: Callable[[str], list[Tensor]],
    timed: Callable[[str], list[Tensor]],
) -> None:  # fmt: skip
    """``checked(backend)`` compared, then ``timed`` under CUDA-graph replay and as it is."""
    with torch.no_grad():
        pairs = list(zip(checked("triton"), checked("reference"), strict=True))
        bench.record(
            name,
            op=op,
            dtype=str(torch.bfloat16),
            features=tokens.shape[3],
            tokens=tokens.shape[0] * tokens.shape[1],
            relative_error=assert_close(name, pairs, torch.bfloat16),
        )
        functions: Functions = {
            "triton, graph": bench.watch.captured(lambda: timed("triton")),
            "triton": lambda: timed("triton"),
            "reference": lambda: timed("reference"),
        }
        bench.record(name, forward_ms=bench.watch.in_turns(functions))


def _turn(bench: Bench, dialogues: int) -> dict[str, Any]:
    """A turn of every dialogue, one after another along T, and memories of D=64, E=128."""
    sizes = (TURN, AUDIO_HEADS, 64, 128, HOST_WIDTH) if bench.is_real else (16, 1, 16, 16, 32)
    length, heads, dim, width, host = sizes
    n, inner = dialogues * length, heads * dim
    q, k, v = (
        normalize(bench.randn(1, n, heads, dim), dim=-1).to(torch.bfloat16) for _ in range(3)
    )  # fmt: skip
    index = torch.arange(n, device=bench.device)
    shapes = ((host,), (inner, host), (inner, host), (host, inner))
    return dict(
        tokens=q,
        k=k,
        v=v,
        lr=torch.full((1, n, heads), 0.3 / length, device=bench.device),
        gate=torch.full((1, dialogues, heads), 0.01, device=bench.device),
        state=MemoryState.from_weights(
            (
                bench.randn(dialogues, heads, dim, width) / dim**0.5,
                bench.randn(dialogues, heads, width, dim) / width**0.5,
            )
        ),
        cu_seqlens=torch.arange(0, n + 1, length, device=bench.device),
        # what a host's prompt looks like: as much text as audio
        hidden=bench.randn(1, 2 * n, host, dtype=torch.bfloat16),
        token_index=2 * index,
        state_index=index // length,
        # the residual is as large as the hidden states, so that an error in it shows
        params=ops.ReadParams(*(bench.randn(*s) for s in shapes)),
    )


def _aligned(
    backend: str, *, hidden: Tensor, token_index: Tensor, state_index: Tensor,
    state: MemoryState, params: ops.ReadParams, **_: Any,
) -> list[Tensor]:  # fmt: skip
    arguments = (hidden, token_index, state_index, state, params)
    return [ops.aligned_residual_read(*arguments, backend=backend)]


def _aligned_in_place(
    backend: str, *, hidden: Tensor, token_index: Tensor, state_index: Tensor,
    state: MemoryState, params: ops.ReadParams, **_: Any,
) -> list[Tensor]:  # fmt: skip
    arguments = (hidden, token_index, state_index, state, params)
    return [ops.aligned_residual_read_(*arguments, backend=backend)]


def _read(
    backend: str, *, tokens: Tensor, state: MemoryState, cu_seqlens: Tensor, **_: Any
) -> list[Tensor]:
    return [ops.memory_read(tokens, state, cu_seqlens=cu_seqlens, backend=backend)]


def _update(
    backend: str, *, k: Tensor, v: Tensor, lr: Tensor, gate: Tensor, state: MemoryState,
    cu_seqlens: Tensor, **_: Any,
) -> list[Tensor]:  # fmt: skip
    new, surprise = ops.memory_update(
        *(k, v, lr, gate, gate, state),
        step="chunk",
        max_grad_norm=1.0,
        init=state.weights,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return [surprise, *new.tensors()]


# --- the bare scan --------------------------------------------------------------------------------


def scan(bench: Bench) -> None:
    """Bandwidth: updates are read once, two states are written once."""
    shapes = {"scan": (4, 4096, 4, 1024), "long scan": (1, 131072, 4, 64)}
    for name, shape in shapes.items() if bench.is_real else [("scan", (1, 32, 1, 16))]:
        update, gates = bench.randn(*shape), torch.rand(2, *shape[:3], device=bench.device)

        def call(
            backend: str, update: Tensor = update, gates: Tensor = gates
        ) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return ops.momentum_scan(update, *gates, backend=backend)

        pairs = list(zip(call("triton"), call("reference"), strict=True))
        error = assert_close(name, pairs, torch.float32)
        backends = ("triton", "reference")
        ms = bench.watch.in_turns({b: functools.partial(call, b) for b in backends})
        moved = 4 * (3 * update.numel() + gates.numel())
        bench.record(
            name,
            op="momentum_scan",
            dtype=str(torch.float32),
            features=shape[3],
            tokens=shape[0] * shape[1],
            relative_error=error,
            forward_ms=ms,
            moved_bytes=moved,
            gigabytes_per_s=moved / ms["triton"]["median"] / 1e6,
        )


# --- profile, and work for the tools that watch kernels from outside ------------------------------


def profile(bench: Bench) -> None:
    """Time by kernel of forward and backward at the training shape, the hottest first."""
    case = bench.case("profile", batch=64, tokens=1024)
    work = DeviceWorkload(layer(case, "triton"), case, bench, torch.bfloat16)
    work.forward_backward()
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if bench.is_real else kind.CPU]) as found:
        work.forward_backward()
        if bench.is_real:
            torch.cuda.synchronize()
    field = "self_device_time_total" if bench.is_real else "self_cpu_time_total"
    spent = {event.key: getattr(event, field) for event in found.key_averages()}
    order = sorted(spent, key=lambda name: -spent[name])[:12]
    bench.record("profile", microseconds={name: spent[name] for name in order})


def hot(bench: Bench) -> None:
    """One forward and backward of few tokens, for ncu."""
    case = bench.case("hot", batch=64, tokens=256)
    DeviceWorkload(layer(case, "triton"), case, bench, torch.bfloat16).forward_backward()


def exercise(bench: Bench) -> None:
    """Every op forward and backward on small odd shapes, for compute-sanitizer."""
    for case in (
        dict(tokens=37, chunk_size=16, residual_norm=True, max_grad_norm=0.5, init=True),
        dict(lengths=[3, 0, 18], chunk_size=None, step="chunk"),
        dict(depth=1, tokens=1, chunk_size=16),
    ):
        inputs = make_inputs(head_dim=20, hidden=36, heads=1, dtype=torch.float32, **case)
        inputs = inputs.map(lambda t: t.to(bench.device).requires_grad_())
        arguments: Any = inputs[:7]
        options = inputs.options
        bounds = {n: x.to(bench.device) for n, x in options.items() if n == "cu_seqlens"}
        out = ops.neural_memory(*arguments, **(options | bounds), backend="triton")
        same = {n: options[n] for n in ("activation", "residual_norm")} | bounds
        read = ops.memory_read(inputs.q, out.state, **same, backend="triton")
        scanned = ops.momentum_scan(inputs.k, inputs.lr, inputs.lr, **bounds, backend="triton")
        torch.stack([x.sum() for x in (out.output, read, *scanned)]).sum().backward()
    turn_of_two = _turn(bench, 2)
    turn_of_two["hidden"].requires_grad_()
    _aligned("triton", **turn_of_two)[0].sum().backward()
    bench.record("exercise", finished=True)


STEPS = {
    f.__name__: f
    for f in (
        *(ceilings, train, closed_form, peer, read_hidden, read, write, decode, scan),
        *(profile, hot, exercise),
    )
}


def main(
    step: Annotated[str, typer.Argument(help=f"One of {', '.join(STEPS)}.")],
    out: Annotated[Path, typer.Argument(help="JSON file.")],
) -> None:
    """Run one step on the GPU, or with TRITON_INTERPRET=1 a dry run of it on the CPU."""
    device = "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1":
        device = "cpu"
        importlib.import_module("tests.interpreter").install()
    STEPS[step](Bench(out, device))


if __name__ == "__main__":
    typer.run(main)
