"""What emulation is for: sanitizers pass the kernels and see the faults planted in them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulation import COMPILER, Refused, in_program, needs_compiler, program, serve
from test_cuda_ops import scan, scan_tensors, values_and_gradients, write_inputs, written

from mal_kernels import ops
from mal_kernels._cuda.build import source_folder

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
WRITE = dict(tokens=70, heads=1, hidden=128, chunk_size=None, step="chunk", max_grad_norm=0.5)
WRITE |= dict(init=True, residual_norm=True)
CASES = {
    "momentum_scan.cu": lambda: [run_scan(**case) for case in SCANS],
    "memory_update.cu": lambda: [written(ops.memory_update, write_inputs(**WRITE), backend="cuda")],
}


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("source", CASES)
def test_sanitizers_find_nothing(source, sanitizer, folder, monkeypatch):
    serve(monkeypatch, in_program(program(folder, source, sanitizer)))
    CASES[source]()


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
        "memory_update.cu",
        "thread",
        ("      cluster_sync();  // h W2, of every block\n", "      __syncthreads();\n"),
        "data race",
    ),
    "a copy is not waited for": (
        "memory_update.cu",
        "thread",
        ("      __syncthreads();  // all of this tile is there; the last one is over\n",
         ""),
        "data race",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug, folder, monkeypatch):
    source, sanitizer, edit, report = BUGS[bug]
    serve(monkeypatch, in_program(program(folder, source, sanitizer, edit)))
    with pytest.raises(Refused, match=report):
        CASES[source]()


def test_shared_memory_starts_as_nan(folder, monkeypatch):
    # what no thread wrote is not a lucky zero
    edit = (
        "  shared.ends[threadIdx.x] = end;\n",
        "  if (t.lane) shared.ends[threadIdx.x] = end;\n",
    )
    serve(monkeypatch, in_program(program(folder, "momentum_scan.cu", "address", edit)))
    assert any(x.isnan().any() for result in CASES["momentum_scan.cu"]() for x in result.values())


LAYOUT_BUGS = {
    "as it is": None,
    "warps": ("16 * (warp % groups)", "16 * (warp / groups)"),
    "ldmatrix": ("Place{lane % 16, 8 * (lane / 16)}", "Place{lane % 8, 8 * (lane / 8)}"),
    "padding": ("kPad = 8", "kPad = 0"),
}


@pytest.mark.parametrize("bug", LAYOUT_BUGS)
def test_every_number_has_one_owner(bug, folder):
    # the index arithmetic alone; a change of it is found
    header = (source_folder() / "memory_update.h").read_text()
    if LAYOUT_BUGS[bug]:
        assert header.count(LAYOUT_BUGS[bug][0]) == 1
        header = header.replace(*LAYOUT_BUGS[bug])
    place = folder / bug.replace(" ", "-")
    place.mkdir()
    (place / "memory_update.h").write_text(header)
    test, out = Path(__file__).parent / "cuda_layout.cpp", place / "layout"
    includes = [f"-I{place}", f"-I{source_folder()}"]
    subprocess.run([*COMPILER, *includes, str(test), "-o", str(out)], check=True)
    done = subprocess.run([out], capture_output=True, text=True)
    assert (done.returncode == 0) == (LAYOUT_BUGS[bug] is None), done.stdout
