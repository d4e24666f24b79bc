"""The kernels of ``csrc/``, executed from nvcc's PTX for sm_90a, against the definition."""

from __future__ import annotations

import contextlib
import ctypes
import re
from types import SimpleNamespace

import pytest
import torch

from mal_kernels import BackendUnavailable, ops
from mal_kernels._cuda import build, library
from mal_kernels._native import packing
from mal_kernels.ops import _backend
from mal_kernels.testing import assert_within_budget, closed_form, low_precision, make_inputs
from mal_kernels.testing.emulation import is_found
from mal_kernels.testing.ptx.cuda import executing
from mal_kernels.testing.ptx.machine import Schedule
from tests.support.ptx import BF16, F16, F32, check_aligned, check_memory, check_scan

pytestmark = [
    pytest.mark.timeout(3600),  # nvcc takes two minutes for all, more on a busy machine
    pytest.mark.skipif(not is_found(build.find_nvcc), reason="nvcc is not installed"),
]
SCHEDULES = [Schedule("early", 1), Schedule("late", 2), Schedule("mixed", 3)]
SCANS = {
    "fp32": (F32, dict(features=(20,))),
    "bf16, two blocks of features": (BF16, dict(features=(520,), heads=1, tokens=21)),
    "fp16, one feature": (F16, dict(features=(), heads=1, tokens=300)),
    "ragged, no decay": (F32, dict(features=(22,), lengths=[5, 0, 40], gates=("momentum",))),
    "no gates, no state": (F32, dict(features=(8,), gates=(), state=False)),
}
NARROW = dict(head_dim=64, hidden=64)
MEMORIES = {
    "norm, clip, init, odd sizes": (
        BF16,
        dict(tokens=37, chunk_size=16, head_dim=24, hidden=40, residual_norm=True,
             max_grad_norm=0.5, init=True),
    ),
    "two blocks, two tiles": (BF16, dict(tokens=100, chunk_size=64, head_dim=64, hidden=128)),
    "turns": (
        BF16, dict(NARROW, lengths=[3, 0, 70], chunk_size=None, step="chunk", init=True,
                   max_grad_norm=1.0),
    ),
    "inside a chunk, gates of 0 and 1": (
        F16, dict(NARROW, batch=2, tokens=20, chunk_size=32, position=True, edges=True),
    ),
    "chunks longer than a tile": (F16, dict(NARROW, tokens=130, chunk_size=100)),
    "linear, norm": (
        BF16, dict(tokens=70, depth=1, head_dim=64, chunk_size=32, residual_norm=True),
    ),
    "128 features, four blocks": (
        BF16, dict(tokens=20, head_dim=128, hidden=100, chunk_size=16, activation="silu"),
    ),
    "128 features, linear, fp16": (F16, dict(tokens=20, head_dim=128, depth=1, chunk_size=16)),
    "no gates": (BF16, dict(NARROW, tokens=20, chunk_size=8, gates=False)),
}  # fmt: skip
READS = {
    "bf16": (BF16, dict()),
    "three parts": (BF16, dict(tokens=70, width=200)),
    "fp16, norm": (F16, dict(residual_norm=True, activation="silu", dim=40)),
    "128 features": (
        BF16, dict(tokens=17, heads=1, dim=128, hidden=300, residual_norm=True),
    ),
    "linear": (BF16, dict(depth=1, activation="relu")),
    "16-bit parameters, unsorted": (
        BF16, dict(params=(None,) * 4, state="unsorted", rows=3, tokens=40),
    ),
}  # fmt: skip
FAST = {"fp32", "fp16, one feature"}


def named(table):
    return [
        pytest.param(name, marks=[] if name in FAST and table is SCANS else pytest.mark.slow)
        for name in table
    ]


def schedule_of(name):
    return SCHEDULES[len(name) % len(SCHEDULES)]


@pytest.mark.parametrize("name", named(SCANS))
def test_momentum_scan(name):
    dtype, sizes = SCANS[name]
    with executing(schedule=schedule_of(name)) as outcomes:
        check_scan("cuda", dtype, **sizes)
    assert len(outcomes) == 2


@pytest.mark.parametrize("name", named(MEMORIES))
def test_neural_memory(name):
    dtype, sizes = MEMORIES[name]
    with executing(schedule=schedule_of(name)) as outcomes:
        check_memory("cuda", dtype, **sizes)
    assert len(outcomes) == 4  # the write runs again for the backward


@pytest.mark.parametrize("name", named(READS))
def test_aligned_residual_read(name):
    dtype, sizes = READS[name]
    with executing(schedule=schedule_of(name)) as outcomes:
        check_aligned("cuda", dtype, gradients=False, **sizes)
    assert outcomes[0].geometry.cooperative


# --- what is refused, what is copied --------------------------------------------------------------


@pytest.mark.slow
def test_views_that_are_not_aligned():
    # each begins two bytes, or four, behind what an allocator gives
    def shifted(x):
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    inputs = make_inputs(dtype=BF16, batch=1, heads=1, tokens=20, chunk_size=16, **NARROW)
    with executing():
        expected = ops.neural_memory(*inputs[:7], **inputs.options, backend="cuda")
        moved = inputs.map(shifted)
        assert moved.k.data_ptr() % 16
        found = ops.neural_memory(*moved[:7], **moved.options, backend="cuda")
    assert torch.equal(found.output, expected.output)


@pytest.mark.slow
def test_a_cluster_for_which_there_is_no_room():
    inputs = make_inputs(
        dtype=BF16, batch=1, heads=1, tokens=3, chunk_size=16, head_dim=64, hidden=1000
    )

    def write():
        return ops.memory_update(*inputs[1:7], **inputs.options, backend="cuda")

    with executing(room=0), pytest.raises(BackendUnavailable, match="refused, error 912"):
        write()
    with executing(checks=False) as outcomes:
        write()
    assert outcomes[0].geometry.cluster == 16


def test_more_rows_than_a_grid_has(monkeypatch):
    rows, message = 65_536, "65,535 rows and heads"
    inputs = make_inputs(
        dtype=BF16, batch=rows, heads=1, tokens=1, head_dim=8, hidden=1, chunk_size=1
    )
    with executing(), pytest.raises(BackendUnavailable, match=message):
        ops.memory_update(*inputs[1:7], **inputs.options, backend="cuda")
    monkeypatch.setattr(_backend, "_no_triton", lambda _: None)
    with pytest.raises(BackendUnavailable, match=message):
        ops.momentum_scan(torch.zeros(rows, 1, 1), None, None, backend="triton")


@pytest.mark.parametrize(
    ("error", "kind"), [(1, BackendUnavailable), (912, BackendUnavailable), (700, RuntimeError)]
)
def test_an_error_of_the_device_is_not_a_missing_backend(error, kind, monkeypatch):
    text = ctypes.create_string_buffer(b"an illegal memory access")
    pretended = SimpleNamespace(
        mal_error=lambda _: ctypes.addressof(text), mal_momentum_scan_fwd=lambda _: error
    )
    monkeypatch.setattr(library, "load", lambda _: pretended)
    monkeypatch.setattr(packing, "_layouts", {})  # of the real function, which has more fields
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    with pytest.raises(kind, match="illegal memory access") as info:
        library.launch("mal_momentum_scan_fwd", torch.device("cuda"), rows=1)
    assert isinstance(info.value, BackendUnavailable) == (kind is BackendUnavailable)
    assert packing.shapes({"rows": 1}) in str(info.value)


# --- planted faults -------------------------------------------------------------------------------

PLANTED = {
    "a barrier of one warp too few": (r"bar\.sync\s+0;", "bar.sync 0, 224;", "races|deadlock"),
    "no barrier": (r"bar\.sync\s+0;", "", "races|wrote|written"),
    "no cluster barrier": (
        r"barrier\.cluster\.arrive[\w.]*;(?s:.*?)barrier\.cluster\.wait[\w.]*;", "",
        "races|wrote|written|leaves|has left|budget",
    ),
    "a wait too few for copies": (
        r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 1;", "cp.async to it is under way",
    ),
    "a wait too few for products": (
        r"(?<=wgmma\.wait_group\.sync\.aligned) 0;", " 1;", "before it is waited for",
    ),
    "no fence of the async proxy": (
        r"fence\.proxy\.async[\w.:]*;", "", "without fence.proxy.async",
    ),
    "another swizzle": (
        r"\b4611\d{15}\b", lambda m: str(int(m[0]) ^ 3 << 62), "budget|wrote|out of",
    ),
    "a cluster's rank": (r"(mapa\.\w+\s+%\w+, %\w+, )%\w+;", r"\g<1>0;", "budget|races|wrote"),
}  # fmt: skip


def planted(pattern, replacement, which):
    """Puts the replacement in place of one match, or of all."""

    def edit(text):
        matches = [*re.finditer(pattern, text)]
        if which is None:
            return re.sub(pattern, replacement, text)
        if which >= len(matches):
            return text
        m = matches[which]
        new = replacement(m) if callable(replacement) else m.expand(replacement)
        return text[: m.start()] + new + text[m.end() :]

    return edit


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault):
    pattern, replacement, report = PLANTED[fault]
    whole = fault in ("another swizzle", "a cluster's rank", "no cluster barrier")
    inputs = make_inputs(
        dtype=BF16, batch=1, heads=1, tokens=150, chunk_size=64, head_dim=64, hidden=128
    )
    golden = closed_form(*inputs.to(torch.float64)[:7], **inputs.options)
    with low_precision(BF16):
        twin = closed_form(*inputs.to(F32)[:7], **inputs.options)

    def forward(which):
        with (
            torch.no_grad(),
            executing(edit=planted(pattern, replacement, which), schedule=Schedule("late")),
        ):
            found = ops.neural_memory(*inputs[:7], **inputs.options, backend="cuda")
        assert_within_budget("output", found.output, golden.output, twin=twin.output, dtype=BF16)

    seen = []
    for which in [None] if whole else range(4):  # some of them are the last of the kernel
        try:
            forward(which)
        except AssertionError as error:  # a Fault is one too
            if re.search(report, str(error)):
                return
            seen.append(str(error))
    raise AssertionError(f"not found: {seen}")
