"""What emulation is for: sanitizers pass the kernels and see the faults planted in them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mal_kernels import ops
from mal_kernels._native.build import source_folder
from mal_kernels.testing import results
from mal_kernels.testing.emulation import (
    COMPILER,
    Refused,
    in_program,
    needs_compiler,
    program,
    serve,
)
from tests.support.cuda import (
    called,
    cuda,
    gradient_inputs,
    layer_on,
    memory_inputs,
    scan,
    scan_tensors,
    turn,
    values_and_gradients,
    write_on,
    written,
)

needs_compiler()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sanitized")


def run_scan(**case):
    tensors, options = scan_tensors(**case)
    return values_and_gradients(scan(ops.momentum_scan, backend="cuda", **options), tensors)


# small, and every way through the kernel: several groups in time and warps, blocks, ragged rows
SCANS = [dict(features=(65,), lengths=[3, 0, 40], heads=1), dict(features=(520,), tokens=9)]
# two blocks of a cluster, two tiles of a chunk, every optional step
MEMORY = dict(heads=1, hidden=128, init=True, residual_norm=True)
WRITE = MEMORY | dict(tokens=70, chunk_size=None, step="chunk", max_grad_norm=0.5)
READ = MEMORY | dict(tokens=70, chunk_size=68)
SHORT = dict(tokens=9, chunk_size=8, max_grad_norm=0.5)
CASES = {
    "momentum_scan.cu": lambda: [run_scan(**case) for case in SCANS],
    "neural_memory_fwd.cu": lambda: [
        written(ops.memory_update, memory_inputs(**WRITE), backend="cuda"),
        called(ops.neural_memory, memory_inputs(**READ), backend="cuda"),
    ],
    "write_bwd.cu": lambda: [
        results(write_on("cpu"), gradient_inputs(**WRITE)),
    ],
    "causal_read_bwd.cu": lambda: [
        results(layer_on("cpu"), gradient_inputs(**READ | SHORT)),
    ],
    # two blocks; parts of a sum, more slabs than are alive and items than blocks, several states
    "aligned_residual_read.cu": lambda: [
        cuda(turn(tokens=17, heads=1, width=392, splits=2), "cpu")
    ],
}


def scan_first(names, source_of):
    """Only the scan's program is built in seconds; those of the memory are slow."""
    slow = [name for name in names if source_of(name) != "momentum_scan.cu"]
    fast = [name for name in names if name not in slow]
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize("sanitizer", [pytest.param("thread", marks=pytest.mark.slow), "address"])
@pytest.mark.parametrize("source", scan_first(CASES, str))
def test_sanitizers_find_nothing(source, sanitizer, folder, monkeypatch):
    serve(monkeypatch, in_program(program(folder, source, sanitizer)))
    CASES[source]()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["neural_memory_fwd.cu", "write_bwd.cu"])
def test_products_of_a_warp_give_the_same_bits(source, folder, monkeypatch):
    # without wgmma; here both sum in the same order
    found = []
    for flags in ((), ("-DMAL_MMA_SYNC",)):
        serve(monkeypatch, in_program(program(folder, source, "thread", *flags)))
        found.append(CASES[source]())
    for by_warpgroup, by_warp in zip(*found, strict=True):
        assert by_warp.keys() == by_warpgroup.keys()
        assert all(torch.equal(x, by_warpgroup[name]) for name, x in by_warp.items())


BUGS = {
    "a barrier is missing": (
        "momentum_scan.cu",
        "thread",
        ("  if (t.lane == 0) shared.gates[t.step] = gates;\n  __syncthreads();\n",
         "  if (t.lane == 0) shared.gates[t.step] = gates;\n"),
        "data race",
    ),
    "two blocks write one element": (
        "momentum_scan.cu",
        "thread",
        ("int64_t partial = t.block * a.tokens * a.H;", "int64_t partial = 0;"),
        "data race",
    ),
    "a barrier that not all reach": (
        "momentum_scan.cu",
        "address",
        ("  __syncthreads();  // the last tile's have been read\n  shared.ends",
         "  if (t.lane) __syncthreads();\n  shared.ends"),
        "waits at a block barrier that others never reach",
    ),
    "tokens beyond the end are written": (
        "momentum_scan.cu",
        "address",
        ("      bool exists = first + i < t.length;\n      int64_t at =",
         "      bool exists = true;\n      int64_t at ="),
        "heap-buffer-overflow",
    ),
    "the cluster is not waited for": (
        "neural_memory_fwd.cu",
        "thread",
        ("    cluster_sync();  // h W2, of every block\n    error(token, count, turn",
         "    block_sync();\n    error(token, count, turn"),
        "data race",
    ),
    "one stage does not wait for another": (
        "aligned_residual_read.cu",
        "thread",
        ("    grid_sync();  // z\n", "    __syncthreads();\n"),
        "data race",
    ),
    "a slab is overwritten that is being read": (
        "aligned_residual_read.cu",
        "thread",
        ("      __syncthreads();  // the slab is there; the one before has been read\n",
         "      __syncwarp();\n"),
        "data race",
    ),
    "sums of tokens that do not exist are written": (
        "aligned_residual_read.cu",
        "address",
        ("if (thread % 4 == 0 && token + thread / 4 < a.tokens)", "if (thread % 4 == 0)"),
        "heap-buffer-overflow",
    ),
    "h W2 is overwritten while others read it": (
        "neural_memory_fwd.cu",
        "thread",
        ("exchange_norms(turn, a.q)", "exchange_norms(turn, false)"),
        "data race",
    ),
    "dq is written where W1 is still read": (
        "causal_read_bwd.cu",
        "thread",
        ("    block_sync();  // the states have been read\n    locate();\n    store_part(d, 1);",
         "    locate();\n    store_part(d, 1);"),
        "data race",
    ),
    "dW2 is overwritten by do while it is read": (
        "write_bwd.cu",
        "thread",
        ("    cluster_sync();  // dδ2, of every block; dW2 and dS2 have been read\n", ""),
        "data race",
    ),
    "a copy is not waited for": (
        "neural_memory_fwd.cu",
        "thread",
        ("      block_sync();  // all of this tile is there; the last one is over\n", ""),
        "gives wgmma what has not passed fence_proxy_async and a barrier",
    ),
    "a copy is not waited for, without wgmma": (
        "neural_memory_fwd.cu",
        "thread",
        ("      block_sync();  // all of this tile is there; the last one is over\n", ""),
        "data race",
        "-DMAL_MMA_SYNC",
    ),
    "a barrier without a fence": (
        "neural_memory_fwd.cu",
        "address",
        ("    block_sync();  // h\n    project(turn);", "    __syncthreads();\n    project(turn);"),
        "gives wgmma what has not passed fence_proxy_async and a barrier",
    ),
    "weights are overwritten that are being read": (
        "neural_memory_fwd.cu",
        "thread",
        ("    block_sync();  // the scores; W and S have been read\n", ""),
        "data race",
    ),
    "a product is not waited for": (
        "neural_memory_fwd.cu",
        "address",
        ("    finish(w1, s1, w2, s2);\n", ""),
        "ends with products that it has not waited for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", scan_first(BUGS, lambda bug: BUGS[bug][0]))
def test_planted_bugs_are_found(bug, folder, monkeypatch):
    source, sanitizer, edit, report, *flags = BUGS[bug]
    serve(monkeypatch, in_program(program(folder, source, sanitizer, *flags, bug=edit)))
    with pytest.raises(Refused, match=report):
        CASES[source]()


def test_shared_memory_starts_as_nan(folder, monkeypatch):
    # what no thread wrote is not a lucky zero
    edit = (
        "  shared.ends[threadIdx.x] = end;\n",
        "  if (t.lane) shared.ends[threadIdx.x] = end;\n",
    )
    serve(monkeypatch, in_program(program(folder, "momentum_scan.cu", "address", bug=edit)))
    assert any(x.isnan().any() for result in CASES["momentum_scan.cu"]() for x in result.values())


LAYOUT_BUGS = {
    "as it is": None,
    "warps": ("neural_memory.h", "16 * (warp % groups)", "16 * (warp / groups)"),
    "ldmatrix": (
        "neural_memory.h",
        "Place{lane % 16, 8 * (lane / 16)}",
        "Place{lane % 8, 8 * (lane / 8)}",
    ),
    "padding": ("neural_memory.h", "kPad = 8", "kPad = 0"),
    "swizzle": ("swizzle.h", "column ^ 8 * (row * kPart / 64 % (kPart / 8))", "column"),
    "swizzle of 64 bytes": ("swizzle.h", "(row * kPart / 64 % (kPart / 8))", "(row % (kPart / 8))"),
    "parts of a tile": ("swizzle.h", "column / kPart * kRows + row", "column / kPart * 64 + row"),
    "descriptor, leading": (
        "swizzle.h",
        "kLeading = kRows * kPart / 8",
        "kLeading = 8 * kPart / 8",
    ),
    "descriptor, stride": ("swizzle.h", "kStride = kPattern / 16", "kStride = kPart / 8"),
    "descriptor, mode": ("swizzle.h", "kPart == 64 ? 1 : 2", "1"),
    "descriptor, start": (
        "swizzle.h",
        "straight(row, column) / 8",
        "straight(row, column % 32) / 8",
    ),
    "half a warp": ("neural_memory.h", "(blocks < kWarps ? blocks : kWarps)", "blocks"),
    "tiles from behind": (
        "write_bwd.h",
        "(start + end - 1) / chunk",
        "(start + end) / chunk",
    ),
    "parts of a sum": (
        "aligned_residual_read.h",
        "slabs * split / splits",
        "slabs / splits * split",
    ),
    "shares of a head": ("aligned_residual_read.h", "i / 4 * kSharing", "i / 4 * kTokens / 2"),
}


@pytest.mark.parametrize("bug", LAYOUT_BUGS)
def test_every_number_has_one_owner(bug, folder):
    # the index arithmetic alone; a change of it is found
    place = folder / bug.replace(" ", "-")
    place.mkdir()
    for header in source_folder().glob("*.h"):
        shutil.copy(header, place)
    if LAYOUT_BUGS[bug]:
        name, *edit = LAYOUT_BUGS[bug]
        text = (place / name).read_text()
        assert text.count(edit[0]) == 1
        (place / name).write_text(text.replace(*edit))
    test, out = Path(__file__).parent / "cuda_layout.cpp", place / "layout"
    subprocess.run([*COMPILER, f"-I{place}", str(test), "-o", str(out)], check=True)
    done = subprocess.run([out], capture_output=True, text=True)
    assert (done.returncode == 0) == (LAYOUT_BUGS[bug] is None), done.stdout
