"""The steps of a GPU session that need the device, each in a process of its own.

``python -m bench.gpu.steps STEP OUT BACKEND...`` writes what it finds to the JSON file OUT as it
goes, so that a step that is stopped loses only what it had not finished. Before a backend is timed,
its results are compared with the reference on the kind of inputs that are timed; one that is wrong
there, or does not serve them, is left out and the results say so. See :mod:`tests.gpu.session` for
what a session is made of.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench import providers
from bench.cases import HOSTS, Calls, Case, Host, Turn, tensors
from bench.gpu.clock import Stopwatch
from bench.interleaved import Functions
from mal_kernels import BackendUnavailable, MemoryState, ops
from mal_kernels.ops._backend import CUDA_OPS, TRITON_OPS
from mal_kernels.testing import plain
from mal_kernels.testing.exercise import run_small
from mal_kernels.testing.plain import Op

# relative RMS error against the reference, which computes in float32 whatever the inputs
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
OPS = {"triton": TRITON_OPS, "cuda": CUDA_OPS}


@dataclass
class Bench:
    """Where a step runs, with which backends, how large, and where its results go."""

    out: Path
    device: str = "cuda"
    backends: Sequence[str] = (*OPS,)
    ops: Sequence[str] = ()  # those to exercise; all if empty

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

    def add(self, name: str, field: str, key: str, value: Any) -> None:
        """Adds to a dictionary in the entry ``name``."""
        found = self.results.get(name, {}).get(field, {})
        self.record(name, **{field: found | {key: value}})

    def right(self, name: str, check: Callable[[str], float]) -> list[str]:
        """The backends that serve a case and agree there with the reference.

        ``check`` gives a backend's error, or raises. The entry ``name`` says what was found: an
        error each, why one cannot serve (``unable``), or how one is wrong (``wrong``).
        """
        found = []
        for backend in self.backends:
            try:
                self.add(name, "relative_error", backend, check(backend))
            except BackendUnavailable as error:
                self.add(name, "unable", backend, str(error))
            except AssertionError as error:
                self.add(name, "wrong", backend, str(error))
            else:
                found.append(backend)
        return found

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
    """A case on the device, tokens in ``dtype``, with any implementation of the op.

    In the place of the leaves that the op does not take (``unused``) stand the keys, so that all
    have a gradient.
    """

    def __init__(
        self, op: Op, case: Case, bench: Bench, dtype: torch.dtype,
        unused: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.op, leaves = op, case.leaves("token")
        dtypes = [dtype] * 3 + [torch.float32] * (len(leaves) - 3)
        self.leaves = [
            x.detach().to(bench.device, d).requires_grad_()
            for x, d in zip(leaves, dtypes, strict=True)
        ]
        self.output_grad = torch.randn_like(self.leaves[0])
        for i in unused:
            self.leaves[i] = self.leaves[1]


def layer(case: Case, backend: str) -> Op:
    """The op of a backend."""

    def op(*arguments: Any) -> tuple[Tensor, MemoryState]:
        out = ops.neural_memory(*arguments, chunk_size=case.chunk_size, backend=backend)
        return out.output, out.state

    return op


def writer(case: Case, backend: str) -> Op:
    """The write alone: the surprise of every token is the output."""

    def op(*arguments: Any) -> tuple[Tensor, MemoryState]:
        new, surprise = ops.memory_update(
            *arguments[1:], chunk_size=case.chunk_size, backend=backend
        )
        return surprise.unsqueeze(-1), new

    return op


Build = Callable[[Case, str], Op]
# of leaves: what these do not take
UNUSED: dict[Build, Sequence[int]] = {layer: (), writer: (0,)}


def compiled_closed_form(bench: Bench, case: Case) -> Op:
    """Plain PyTorch, the chunk compiled (not in a dry run), products in bf16 by autocast."""
    op = plain.closed_form(case.chunk_size, compiled=bench.is_real)

    def autocast(*arguments: Any) -> tuple[Tensor, MemoryState]:
        with torch.autocast(bench.device, torch.bfloat16):
            return op(*arguments)

    return autocast


def check_layer(backend: str, *, bench: Bench, case: Case, build: Build) -> float:
    """Output, state and, where there is a backward, gradients of a few chunks of the case."""
    short = replace(case, batch=min(case.batch, 8), tokens=min(case.tokens, 5 * case.chunk_size))
    found = []
    for name in (backend, "reference"):
        work = DeviceWorkload(build(short, name), short, bench, torch.bfloat16, UNUSED[build])
        torch.manual_seed(1)
        work.output_grad = bench.randn(*work.output_grad.shape, dtype=torch.bfloat16)
        with torch.no_grad():
            output, state = work.run()
        found.append([output, *state.tensors()])
        with suppress(BackendUnavailable):
            found[-1] += work.forward_backward()
    return assert_close(case.name, list(zip(*found, strict=False)), torch.bfloat16)


def time_layer(
    bench: Bench,
    case: Case,
    others: Mapping[str, providers.Workload] | None = None,
    build: Build = layer,
) -> None:
    """The backends that are right and ``others``: forward, then forward and backward, in turns."""
    check = functools.partial(check_layer, bench=bench, case=case, build=build)
    works: dict[str, providers.Workload] = {
        name: DeviceWorkload(build(case, name), case, bench, torch.bfloat16, UNUSED[build])
        for name in bench.right(case.name, check)
    }
    works.update(others or {})
    bench.record(
        case.name,
        op="memory_update" if build is writer else "neural_memory",
        dtype=str(torch.bfloat16),
        features=case.head_dim,
        tokens=case.batch * case.tokens,
        shape=asdict(case),
        # a write of token steps has as many products as write and read of chunk steps
        forward_tflop=case.flops("chunk" if build is writer else "token") / 1e12,
    )
    for kind in ("forward", "forward_backward"):
        able = _able(bench, case.name, {n: getattr(w, kind) for n, w in works.items()})
        bench.record(case.name, **{f"{kind}_ms": bench.watch.in_turns(able)})
        peaks = {n: bench.watch.peak_bytes(f) for n, f in able.items()}
        bench.record(case.name, peak_bytes=peaks)  # in the end those with a backward


def _able(bench: Bench, case: str, functions: Functions) -> dict[str, Callable[[], object]]:
    """Keeps the functions that can run; the results say why the others cannot."""
    able = {}
    for name, function in functions.items():
        try:
            function()
            able[name] = function
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            bench.add(case, "unable", name, "out of memory")
        except BackendUnavailable as error:
            bench.add(case, "unable", name, str(error))
    return able


def train(bench: Bench) -> None:
    """The training shape of the targets: two heads for each of 132 multiprocessors, 4096 tokens."""
    _train(bench, "train", layer)


def train_writes(bench: Bench) -> None:
    """The layer is written and not read."""
    _train(bench, "train writes", writer)


def _train(bench: Bench, name: str, build: Build) -> None:
    case = bench.case(name, batch=66, tokens=4096)
    op = build(case, "reference")
    reference = DeviceWorkload(op, case, bench, torch.bfloat16, UNUSED[build])
    time_layer(bench, case, {"reference": reference}, build)
    states = 2 * 4 * case.batch * case.heads * 2 * case.head_dim * case.hidden_dim
    bench.record(name, saved_state_bytes=case.tokens // case.chunk_size * states)


def one_dialogue(bench: Bench) -> None:
    """Few heads: 8, of one row of 2048 tokens."""
    time_layer(bench, bench.case("one dialogue", batch=1, heads=8, tokens=2048))


def closed_form(bench: Bench) -> None:
    """Against plain PyTorch, its chunk compiled."""
    case = bench.case("closed form", batch=64, tokens=1024)
    torch.set_default_device(bench.device)
    theirs, reference = (
        DeviceWorkload(op, case, bench, torch.bfloat16)
        for op in (compiled_closed_form(bench, case), layer(case, "reference"))
    )
    with torch.no_grad():
        pairs = [(theirs.run()[0], reference.run()[0])]
    error = assert_close("torch.compile", pairs, torch.bfloat16)
    bench.record("closed form", disagreement=error)
    time_layer(bench, case, {"torch.compile": theirs})


def peer(bench: Bench) -> None:
    """Against titans-pytorch at the same work, found equal in float32 before it is timed."""
    from mal_kernels.testing.oracles import TitansPytorch

    case = bench.case("peer", batch=4, tokens=1024)
    theirs = TitansPytorch(
        heads=case.heads,
        head_dim=case.head_dim,
        hidden_dim=case.hidden_dim,
        chunk_size=case.chunk_size,
    ).to(bench.device)
    short = replace(case, batch=1, tokens=2 * case.chunk_size)
    a, b = (
        DeviceWorkload(op, short, bench, torch.float32)
        for op in (layer(short, "reference"), theirs)
    )
    b.output_grad = a.output_grad
    bench.record("peer", agreement=providers.agreement(a, b))
    torch.set_float32_matmul_precision("high")
    bench.record("peer", float32_matmuls="TF32", titans_pytorch_dtype="torch.float32")
    work = DeviceWorkload(theirs, case, bench, torch.float32)
    time_layer(bench, case, {"titans-pytorch": work})


# --- a turn of a dialogue, a token of a stream ----------------------------------------------------

# ops of a step; where one is timed in place, what is timed instead
TURNS = {
    "read_hidden": ("aligned_residual_read",),
    "read": ("memory_read",),
    "write": ("memory_update",),
    "turn": ("aligned_residual_read", "memory_update"),
}
IN_PLACE = {"aligned_residual_read": "aligned_residual_read_"}


def turns(bench: Bench, step: str) -> None:
    """One turn of 112 audio tokens, of 1 and of 32 dialogues at once."""
    host = HOSTS[-1] if bench.is_real else Host("tiny", 32, 1, 16, 0)
    for dialogues in (1, 32) if bench.is_real else (1, 2):
        turn = Turn(host, dialogues, *(() if bench.is_real else (1, 16, 16)))
        calls = turn.calls(bench.device, torch.bfloat16)

        def run(backend: str, names: Sequence[str], calls: Calls = calls) -> list[Tensor]:
            return [x for name in names for x in tensors(calls[name](backend=backend))]

        checked = TURNS[step]
        timed = [IN_PLACE.get(name, name) for name in checked]
        _time_latency(
            bench, f"{step} ×{dialogues}", ", ".join(checked), turn.D, turn.dialogues * host.tokens,
            functools.partial(run, names=checked), functools.partial(run, names=timed),
        )  # fmt: skip


def decode(bench: Bench) -> None:
    """One token per dialogue, written and read."""
    for rows in (1, 32, 256) if bench.is_real else (1,):
        case = replace(bench.case("decode"), batch=rows, tokens=1)
        q, k, v, *gates, w1, w2, s1, s2 = (x.detach() for x in case.leaves("token"))
        qkv = [x.to(bench.device, torch.bfloat16) for x in (q, k, v)]
        gates = [x.to(bench.device) for x in gates]
        state = MemoryState((w1, w2), (s1, s2), (w1, w2), torch.ones(rows, dtype=torch.int64))
        state = state.to(bench.device)

        def op(
            backend: str,
            qkv: list[Tensor] = qkv,
            gates: list[Tensor] = gates,
            state: MemoryState = state,
        ) -> list[Tensor]:
            inputs: Any = (*qkv, *gates, state)
            out = ops.neural_memory(*inputs, chunk_size=64, backend=backend)
            return [out.output, *out.state.tensors()]

        _time_latency(bench, f"decode ×{rows}", "neural_memory", case.head_dim, rows, op, op)


def _time_latency(
    bench: Bench, name: str, op: str, features: int, tokens: int,
    checked: Callable[[str], list[Tensor]], timed: Callable[[str], list[Tensor]],
) -> None:  # fmt: skip
    """``checked(backend)`` compared, then ``timed`` under CUDA-graph replay and as it is."""
    with torch.no_grad():
        bench.record(name, op=op, dtype=str(torch.bfloat16), features=features, tokens=tokens)
        expected = checked("reference")

        def check(backend: str) -> float:
            pairs = list(zip(checked(backend), expected, strict=True))
            return assert_close(name, pairs, torch.bfloat16)

        functions: dict[str, Callable[[], object]] = {}
        for backend in bench.right(name, check):
            functions[backend] = functools.partial(timed, backend)
            functions[f"{backend}, graph"] = bench.watch.captured(functions[backend])
        functions["reference"] = functools.partial(timed, "reference")
        bench.record(name, forward_ms=bench.watch.in_turns(functions))


# --- the bare scan --------------------------------------------------------------------------------


def scan(bench: Bench) -> None:
    """Bandwidth: updates are read once, two states are written once."""
    shapes = {"scan": (4, 4096, 4, 1024), "long scan": (1, 131072, 4, 64)}
    for name, shape in shapes.items() if bench.is_real else [("scan", (1, 32, 1, 16))]:
        update, gates = bench.randn(*shape), torch.rand(2, *shape[:3], device=bench.device)
        call = functools.partial(ops.momentum_scan, update, *gates)
        with torch.no_grad():
            check = functools.partial(_check_scan, name, call, call(backend="reference"))
            backends = [*bench.right(name, check), "reference"]
            ms = bench.watch.in_turns({b: functools.partial(call, backend=b) for b in backends})
        moved = 4 * (3 * update.numel() + gates.numel())
        bench.record(
            name,
            op="momentum_scan",
            dtype=str(torch.float32),
            features=shape[3],
            tokens=shape[0] * shape[1],
            forward_ms=ms,
            moved_bytes=moved,
            gigabytes_per_s={b: moved / q["median"] / 1e6 for b, q in ms.items()},
        )


def _check_scan(
    name: str, call: Callable[..., Sequence[Tensor]], expected: Sequence[Tensor], backend: str
) -> float:
    pairs = list(zip(call(backend=backend), expected, strict=True))
    return assert_close(name, pairs, torch.float32)


# --- profile, and work for the tools that watch kernels from outside ------------------------------


def profile(bench: Bench) -> None:
    """Time by kernel of forward and backward at the training shape, the hottest first."""
    kind = torch.profiler.ProfilerActivity
    field = "self_device_time_total" if bench.is_real else "self_cpu_time_total"
    case = bench.case("profile", batch=64, tokens=1024)
    for backend in bench.backends:
        work = DeviceWorkload(layer(case, backend), case, bench, torch.bfloat16)
        run = _able(bench, "profile", {"both": work.forward_backward}).get("both", work.forward)
        run()
        with torch.profiler.profile(activities=[kind.CUDA if bench.is_real else kind.CPU]) as found:
            run()
            if bench.is_real:
                torch.cuda.synchronize()
        spent: Counter[str] = Counter()
        for event in found.key_averages():
            spent[kernel_name(event.key)] += getattr(event, field)
        bench.record("profile", **{backend: dict(spent.most_common(12))})


def kernel_name(key: str) -> str:
    """``write`` for ``void mal::(anonymous namespace)::write<float, 64>(arguments)``."""
    found = re.search(r"(\w+)[<(]", key.replace("(anonymous namespace)", ""))
    return found[1] if found else key


def exercise(bench: Bench) -> None:
    """Small odd shapes of every op, for compute-sanitizer."""
    for backend in bench.backends:
        for op in bench.ops or OPS[backend]:
            run_small(op, backend, bench.device)
            bench.record("exercise", **{f"{backend} {op}": "finished"})


STEPS: dict[str, Callable[[Bench], None]] = {
    **{step: functools.partial(turns, step=step) for step in TURNS},
    "ceilings": ceilings,
    "train": train,
    "train_writes": train_writes,
    "one_dialogue": one_dialogue,
    "closed_form": closed_form,
    "peer": peer,
    "decode": decode,
    "scan": scan,
    "profile": profile,
    "exercise": exercise,
}


def main(
    step: Annotated[str, typer.Argument(help=f"One of {', '.join(STEPS)}.")],
    out: Annotated[Path, typer.Argument(help="JSON file.")],
    backends: Annotated[list[str] | None, typer.Argument(help="All if left out.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="To exercise; all if left out.")] = None,
) -> None:
    """Run one step on the GPU, or with TRITON_INTERPRET=1 a dry run of it on the CPU."""
    device = "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1":
        device = "cpu"
        from mal_kernels.testing import interpreter

        interpreter.install()
        emulate(out.with_name("libemulated.so"))
    bench = Bench(out, device, backends or (*OPS,), op or ())
    STEPS[step](bench)
    wrong = [f"{name}: {row['wrong']}" for name, row in bench.results.items() if "wrong" in row]
    if wrong:
        sys.exit("; ".join(wrong))


def emulate(library: Path) -> None:
    """``backend="cuda"`` serves the CPU from here on, if its emulation was built."""
    if library.exists():
        import pytest

        from mal_kernels._cuda import library as cuda
        from mal_kernels.testing import emulation

        emulated = emulation.in_process(cuda.opened(library))
        emulation.serve(pytest.MonkeyPatch(), emulated)


if __name__ == "__main__":
    typer.run(main)
