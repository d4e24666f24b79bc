"""Bugs planted in the CPU kernels fail the assertions that the kernels pass; sanitizers watch."""

from __future__ import annotations

import functools

import pytest
import torch

from mal_kernels import ops
from mal_kernels.testing import assert_parity, make_inputs, results
from mal_kernels.testing.emulation import Refused
from tests.support.native import SANITIZERS, compiled, needs_library, serve, serve_program

needs_library()

neural_memory = functools.partial(ops.neural_memory, backend="cpu")

BUGS = {
    "a token's own write decays": ("E[i] = 1, w[i] = 1;", "E[i] = 1, w[i] = a;"),
    "a token does not read its own write": (
        "first_lanes(i + 1 - s, -scale",
        "first_lanes(i - s, -scale",
    ),
    "every tile opens a chunk": ("first && at == 0, t + C", "at == 0, t + C"),
    "momentum never reaches the weights": (
        "vec w = beta * load(W.at[l] + i) + f * s;",
        "vec w = beta * load(W.at[l] + i);",
    ),
    "a chunk's momentum acts at its end": (
        "if (at.opens)\n    each_vector(z, [&]",
        "if (at.closes)\n    each_vector(z, [&]",
    ),
    "the gradient of f is lost": ("  d.f[last] += dot(k.shape, d.W, S);\n", ""),
    "a gradient passes by the momentum": ("store(mu + s, m * t.eta[i]);", "store(mu + s, m);"),
    "each tile is its own anchor": ("? kept.W[first] : anchor", "? kept.W[i] : anchor"),
    "the deviation has no gradient": ("d.z, d.more, d.z);", "d.z, nullptr, d.z);"),
    "what is clipped has no gradient": ("if (t.clip[s] >= 1) continue;", "continue;"),
}
# the others wait for `make prove`
QUICK = (
    "a token does not read its own write",
    "each tile is its own anchor",
    "the gradient of f is lost",
)
# two tiles in a chunk, and another chunk
PROBE = dict(tokens=75, batch=1, chunk_size=67, init=True, residual_norm=True, max_grad_norm=0.5)


def probes():
    """Calls in which every line of the kernels counts."""
    for step in ("token", "chunk"):
        yield make_inputs(**PROBE, step=step, dtype=torch.float32)


def test_the_probes_pass(monkeypatch, tmp_path):
    serve(monkeypatch, compiled(tmp_path))
    for inputs in probes():
        assert_parity(neural_memory, inputs)


@pytest.mark.parametrize(
    "bug", [pytest.param(b, marks=() if b in QUICK else pytest.mark.slow) for b in BUGS]
)
def test_a_planted_bug_is_seen(bug, monkeypatch, tmp_path):
    serve(monkeypatch, compiled(tmp_path, bug=BUGS[bug]))

    def every_probe():
        for inputs in probes():
            assert_parity(neural_memory, inputs)

    with pytest.raises(AssertionError, match="of budget"):
        every_probe()


def test_scratch_that_remembers_is_seen(monkeypatch, tmp_path):
    # a sum over the padding: right until something has left its NaN there
    bug = ("b.at[l] + i * y.stride, y.out);", "b.at[l] + i * y.stride, y.stride);")
    serve(monkeypatch, compiled(tmp_path, bug=bug))
    inputs = make_inputs(head_dim=9, hidden=13, dtype=torch.float32)
    before = results(neural_memory, inputs)
    results(neural_memory, inputs._replace(v=inputs.v * torch.nan))
    after = results(neural_memory, inputs)
    assert not all(torch.equal(after[name], x) for name, x in before.items())


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("sanitized"), *SANITIZERS)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["token", "chunk"])
@pytest.mark.parametrize(
    "case",
    [
        dict(head_dim=19, hidden=37, residual_norm=True, init=True, max_grad_norm=0.5),
        dict(depth=1, head_dim=5, lengths=[5, 0, 17, 1]),
        dict(tokens=150, batch=1, chunk_size=140, activation="silu", dtype=torch.bfloat16),
        dict(tokens=0, activation="relu", dtype=torch.float16),
    ],
)
def test_sanitizers_find_nothing(case, step, sanitized, monkeypatch):
    inputs = make_inputs(**dict(dtype=torch.float32) | case, step=step)
    expected = results(neural_memory, inputs)
    serve_program(monkeypatch, sanitized)
    for name, x in results(neural_memory, inputs).items():
        torch.testing.assert_close(x, expected[name], rtol=2e-2, atol=1e-3)  # it ran


FAULTS = {
    "reads past the tokens": (
        "(from) + first + t * stride, 4 * D)",
        "(from) + first + t * stride, 4 * ldt)",
    ),
    "little scratch": ("m.take(std::max(features, units), TILE);", "m.take(VL, VL);"),
    "a gate too far": ("row * c.chunk_gates) + chunk)", "row * c.chunk_gates) + chunk + 1)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_sanitizers_see_a_planted_fault(fault, monkeypatch, tmp_path):
    serve_program(monkeypatch, compiled(tmp_path, *SANITIZERS, bug=FAULTS[fault]))

    def both_steps():
        for step in ("token", "chunk"):
            inputs = make_inputs(head_dim=19, hidden=37, step=step, dtype=torch.float32)
            results(neural_memory, inputs)

    with pytest.raises(Refused, match="AddressSanitizer"):
        both_steps()
