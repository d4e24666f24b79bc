"""The questions that people ask before they use this, each answered by one measurement."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench import cases
from bench.cases import Case
from bench.interleaved import in_turns, peak_rss, run_python
from bench.providers import (
    COMPILED,
    EAGER,
    LOOP,
    OURS,
    OURS_CHUNK,
    PROVIDERS,
    THEIRS,
    THEIRS_CHUNK,
    Disagreement,
    Provider,
    Workload,
    agreement,
    neighbours,
)
from bench.questions import conversation as turns
from bench.questions import overhead as hosts
from mal_kernels import MALAdapter, MALConfig, reference
from mal_kernels.state import MemoryState
from mal_kernels.testing import closed_form

SWEEP = (OURS, THEIRS, EAGER, OURS_CHUNK, THEIRS_CHUNK)
Result = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """How thorough, and whom to tell what is being measured."""

    quick: bool
    threads: int
    rates: dict[str, float]
    say: Callable[[str], None] = lambda text: None

    @property
    def seconds(self) -> float:
        """Per function that is timed."""
        return 0.05 if self.quick else 0.5

    def some(self, every: Sequence[Case]) -> Sequence[Case]:
        """All sizes, or of a quick run the smallest ones."""
        return every[:3] if self.quick else every


def measure_case(case: Case, providers: Sequence[Provider], bench: Bench) -> Result:
    """Agreement with the first provider of the same steps, then times of all that agree."""
    works: dict[str, Workload] = {}
    first: dict[str, Workload] = {}
    row: Result = {
        "case": asdict(case),
        "forward_gflop": {s: case.flops(s) / 1e9 for s in ("token", "chunk")},
        "io_megabytes": case.io_bytes() / 1e6,
        "relative_error": {},
        "not_timed": {},
    }
    for provider in providers:
        if not provider.runs(case):
            row["not_timed"][provider.name] = "too large, or a chunk is left open"
            continue
        bench.say(f"{case.name}: checking {provider.name}")
        work = Workload(provider, case)
        try:
            if provider.step in first:
                found = agreement(first[provider.step], work)
                row["relative_error"][provider.name] = found
        except Disagreement as error:
            row["not_timed"][provider.name] = f"disagrees: {error}"
        else:
            works[provider.name] = work
            first.setdefault(provider.step, work)
    for kind in ("forward", "forward_backward"):
        bench.say(f"{case.name}: timing {kind.replace('_', ' + ')}")
        functions = {name: getattr(work, kind) for name, work in works.items()}
        row[f"{kind}_ms"] = in_turns(functions, seconds=bench.seconds)
    return row


def peers(bench: Bench) -> Result:
    """What do I gain over what there is?"""
    skipped = (COMPILED, LOOP) if bench.quick else ()  # half a minute each
    listed = [p for p in PROVIDERS if p not in skipped]
    # the slow ones once
    rest = [p for p in listed if p not in (COMPILED, LOOP)]
    every = [*bench.some(cases.CASES), cases.DECODE]
    if bench.quick:
        every = [replace(c, tokens=min(c.tokens, 128)) for c in every]
    found = {
        case.name: measure_case(case, listed if case.name == "base" else rest, bench)
        for case in every
    }
    not_run = {p.name: "left out of a quick run" for p in skipped}
    return {"cases": found, "not_run": not_run | neighbours()}


def _sweep(every: Sequence[Case]) -> Callable[[Bench], Result]:
    """How does throughput change with one size?"""
    return lambda bench: {"points": [measure_case(c, SWEEP, bench) for c in bench.some(every)]}


def sizes(bench: Bench) -> Result:
    """What do wider heads (D, with E = 2 D) and wider memories (E, with D = 64) cost?"""
    both = {"features": cases.BY_FEATURES, "width": cases.BY_WIDTH}
    return {by: _sweep(every)(bench)["points"] for by, every in both.items()}


def ops(bench: Bench) -> Result:
    """How far is each op from what this machine can do?"""
    every = cases.op_cases(
        cases.HOSTS[:1] if bench.quick else cases.HOSTS,
        (1,) if bench.quick else (1, 8),
        [Case("training", batch=1 if bench.quick else 4, tokens=64 if bench.quick else 1024)],
    )
    rows = []
    for case in every:
        bench.say(f"{case.op}, {case.where}")
        with torch.no_grad():
            ms = in_turns({"op": case.call}, seconds=bench.seconds / 2)["op"]
        share = case.bound_ms(bench.rates) / ms["median"]
        work = {"flops": case.flops, "bytes": case.bytes}
        rows.append({"op": case.op, "where": case.where, **work, "ms": ms, "share": share})
    return {"rows": rows}


def memory(bench: Bench) -> Result:
    """How much memory does training on T tokens take?"""
    tokens = (64, 128) if bench.quick else (256, 512, 1024)
    result = {}
    for provider in (OURS, THEIRS, EAGER, OURS_CHUNK, THEIRS_CHUNK):
        bench.say(provider.name)
        index = PROVIDERS.index(provider)
        code = f"import bench.questions as b; b.print_peaks({index}, {tokens}, {bench.threads})"
        peaks = {int(t): int(x) for t, x in json.loads(run_python(code)).items()}
        slope = statistics.linear_regression(list(peaks), list(peaks.values())).slope
        result[provider.name] = {"peak_bytes": peaks, "bytes_per_token": slope}
    return result


def print_peaks(provider: int, tokens: Sequence[int], threads: int) -> None:
    """JSON of the peak of this process after forward and backward of ascending lengths."""
    torch.set_num_threads(threads)
    peaks = {}
    for t in tokens:
        Workload(PROVIDERS[provider], Case("memory", tokens=t)).forward_backward()
        peaks[t] = peak_rss()
    print(json.dumps(peaks))


def conversation(bench: Bench) -> Result:
    """What does the next turn cost after many?"""
    every = (0, 1, 3, 10) if bench.quick else (0, 1, 3, 10, 30, 100, 300, 1000)
    longest, cached = (1, 3) if bench.quick else (100, 1000)
    return turns.cost_of_a_turn(every, longest, cached, bench.say)


def overhead(bench: Bench) -> Result:
    """What does the memory add to my model?"""
    names = hosts.NARROW
    rounds = (2, 2) if bench.quick else (12, 150)
    found = {}
    for name in names:
        bench.say(hosts.TITLES[name])
        found[hosts.TITLES[name]] = hosts.overhead(name, *rounds)
    return found


def error(bench: Bench) -> Result:
    """Does it drift over a long stream?

    Relative RMS error of the output, in stretches of the stream that double in length, against the
    token-by-token recurrence in float64.
    """
    tokens = 256 if bench.quick else 4096
    case = Case("error", heads=1, tokens=tokens, head_dim=32, hidden_dim=64)
    *qkv, lr, momentum, decay, w1, w2, s1, s2 = (x.detach() for x in case.leaves("token"))
    # a hundredth of the decay, which pulls toward zero: a deep memory would be dead by T = 2048
    leaves = [*qkv, lr, momentum, decay / 100, w1, w2, s1, s2]

    def run(
        function: Callable[..., Any], token_dtype: torch.dtype, dtype: torch.dtype, n: int = tokens
    ) -> Tensor:
        *inputs, w1, w2, s1, s2 = leaves
        cast = [x[:, :n].to(token_dtype if i < 3 else dtype) for i, x in enumerate(inputs)]
        state = MemoryState((w1, w2), (s1, s2)).map(lambda x: x.to(dtype))
        out = function(*cast, state, chunk_size=case.chunk_size).output
        return out.detach().double()

    bench.say("the recurrence in float64")
    golden = run(reference.recurrence, torch.float64, torch.float64)
    edges = [0, *(2**i for i in range(6, tokens.bit_length()))]

    def errors(found: Tensor) -> list[float]:
        stretches = [(a, b) for a, b in pairwise(edges) if b <= found.shape[1]]
        return [
            float((found[:, a:b] - golden[:, a:b]).norm() / golden[:, a:b].norm())
            for a, b in stretches
        ]

    bench.say("float32 and bfloat16")
    single, low = torch.float32, torch.bfloat16
    curves = {
        "mal_kernels, float32": errors(run(closed_form, single, single)),
        "mal_kernels, bfloat16 tokens": errors(run(closed_form, low, single)),
        "token by token, float32": errors(run(reference.recurrence, single, single)),
    }
    short = replace(case, tokens=min(tokens, 1024))
    with torch.no_grad():
        bench.say("titans-pytorch")
        *inputs, w1, w2, s1, s2 = leaves
        state = MemoryState((w1, w2), (s1, s2))
        op = THEIRS.build(short)
        found = op(*(x[:, : short.tokens] for x in inputs), state)[0].double()
    curves["titans-pytorch, float32"] = errors(found)
    return {"case": asdict(case), "until": edges[1:], "relative_rms": curves}


def state(bench: Bench) -> Result:
    """How much do I store per dialogue?"""

    def nbytes(hidden: int, heads: int = 4) -> int:
        adapter = MALAdapter(MALConfig(hidden_size=hidden, heads=heads))
        assert adapter.memory is not None
        return adapter.memory.initial_state(1).nbytes

    rows = []
    for host in cases.HOSTS:
        bench.say(host.name)
        rows.append(
            {
                **asdict(host),
                "memory_bytes": nbytes(host.hidden),
                # heads that are together as wide as the host
                "wide_memory_bytes": nbytes(host.hidden, heads=host.hidden // 64),
            }
        )
    return {"rows": rows}


def imports(bench: Bench) -> Result:
    """How long does the import take? Seconds, fresh processes in turns."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    samples: dict[str, list[float]] = {"torch": [], "mal_kernels": []}
    for _ in range(1 if bench.quick else 3):
        for name, seconds in samples.items():
            bench.say(name)
            seconds.append(float(run_python(code.format(name))))
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


QUESTIONS: dict[str, Callable[[Bench], Result]] = {
    "peers": peers,
    "tokens": _sweep(cases.BY_TOKENS),
    "heads": _sweep(cases.BY_HEADS),
    "sizes": sizes,
    "ops": ops,
    "memory": memory,
    "conversation": conversation,
    "overhead": overhead,
    "error": error,
    "state": state,
    "imports": imports,
}
