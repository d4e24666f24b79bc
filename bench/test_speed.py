"""The speed of every op and of every rival, for pytest-benchmark: ``pytest bench/test_speed.py``.

What does not agree with the reference fails and is not timed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from bench.cases import CASES, DECODE, OPS, PEERS, Case, tensors
from bench.interleaved import in_turns, quantiles
from bench.providers import PROVIDERS, SLOW, SWEPT, Provider, Workload, checked, relative_error

# a rival's warning, such as torch.compile's, is not an error here
pytestmark = pytest.mark.filterwarnings("default")
SECONDS = 0.5  # for each function
KINDS = ("forward", "forward_backward")


def field() -> Iterator[tuple[str, str]]:
    """Names of cases and of the providers that are timed on them."""
    for case in CASES.values():
        listed = PROVIDERS.values() if case in (*PEERS, DECODE) else SWEPT
        for provider in listed:
            if provider.runs(case) and (case is PEERS[0] or provider not in SLOW):
                yield case.name, provider.name


class Replay:
    """A clock that shows pytest-benchmark the calls that were timed in turns."""

    def __init__(self) -> None:
        self.times: Iterator[float] = iter(())

    def __call__(self) -> float:
        """The next reading."""
        return next(self.times)

    def load(self, ms: list[float]) -> None:
        """The next readings: start and end of every call, in seconds."""
        self.times = itertools.chain.from_iterable((0.0, x / 1e3) for x in ms)


replay = Replay()


@functools.lru_cache(maxsize=len(PROVIDERS))  # all on one case
def agreed(provider: Provider, case: Case) -> tuple[Workload, dict[str, float]]:
    """The provider on the case, which agrees there with the reference."""
    return checked(provider, case)


@functools.lru_cache(maxsize=2)  # both kinds
def samples(case: Case, kind: str, rivals: tuple[str, ...]) -> dict[str, list[float]]:
    """Milliseconds of every rival, in turns; one that disagrees fails in a test of its own."""
    functions = {}
    for name in rivals:
        with suppress(AssertionError):
            functions[name] = getattr(agreed(PROVIDERS[name], case)[0], kind)
    return in_turns(functions, seconds=SECONDS)


@pytest.fixture
def work(case: str, provider: str) -> tuple[Workload, dict[str, float]]:
    """The provider on the case; agreement comes before any time."""
    return agreed(PROVIDERS[provider], CASES[case])


@pytest.fixture
def rivals(request: pytest.FixtureRequest, case: str, kind: str) -> tuple[str, ...]:
    """The providers that this run times on the case."""
    params = [getattr(item, "callspec").params for item in request.session.items]  # noqa: B009
    same = [p for p in params if p.get("case") == case and p.get("kind") == kind]
    return tuple(p["provider"] for p in same)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "provider"), [*field()])
def test_layer(
    benchmark: Any,
    case: str,
    provider: str,
    kind: str,
    work: tuple[Workload, dict[str, float]],
    rivals: tuple[str, ...],
) -> None:
    """The causal layer with token and with chunk steps."""
    call, errors = getattr(work[0], kind), work[1]
    if benchmark.disabled:
        call()
        return
    ms = samples(CASES[case], kind, rivals)[provider]
    replay.load(ms)
    benchmark.group = f"{case}, {kind}"
    benchmark.pedantic(lambda: None, rounds=len(ms))
    flops = CASES[case].flops(PROVIDERS[provider].step) * (1 if kind == "forward" else 3)
    describe(benchmark, flops, CASES[case].io_bytes(), errors, ms)


@pytest.mark.parametrize("case", [*OPS])
def test_op(benchmark: Any, case: str) -> None:
    """Forward of one op at a real size."""
    call = OPS[case].calls()[OPS[case].op]
    with torch.no_grad():
        found = [tensors(call(backend=backend)) for backend in ("auto", "reference")]
        error = max(map(relative_error, *found))
        assert error <= 1e-5, f"differs from the reference by {error:.1e}"
        benchmark(call)
    if benchmark.enabled:
        ms = [1e3 * x for x in benchmark.stats.stats.data]
        describe(benchmark, OPS[case].flops, OPS[case].bytes, {"forward": error}, ms)


def describe(
    benchmark: Any, flops: int, nbytes: int, errors: dict[str, float], ms: list[float]
) -> None:
    """The least work, and the quantiles that tables show, in seconds as all statistics are."""
    found = quantiles(ms)
    benchmark.extra_info |= {
        "flops": flops,  # a backward counts as two forwards
        "bytes": nbytes,  # of a forward
        "relative_error": errors,
        "p20": found["p20"] / 1e3,
        "p80": found["p80"] / 1e3,
    }
