"""Finding and building the CUDA library, with a compiler that only pretends, and with nvcc."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mal_kernels import BackendUnavailable
from mal_kernels._cuda import build, library
from mal_kernels._native import packing
from mal_kernels.call import AlignedCall, MemoryCall, ScanCall
from mal_kernels.testing.emulation import is_found

ROOT = Path(__file__).parents[2]
PRETENDER = """#!{python}
import sys, pathlib
out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
with open({log!r}, "a") as log: log.write(" ".join(sys.argv[1:]) + chr(10))
if {broken!r} in sys.argv[-3]: sys.exit("error: expected a semicolon")
out.write_text("compiled")
"""


@pytest.fixture
def pretender(tmp_path, monkeypatch):
    """Installs an nvcc that writes its arguments to a log; returns how to, and the log's lines."""
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(broken="nothing"):
        nvcc = tmp_path / "bin/nvcc"
        nvcc.parent.mkdir(exist_ok=True)
        nvcc.write_text(PRETENDER.format(python=sys.executable, log=str(log), broken=broken))
        nvcc.chmod(0o755)

    install()
    return install, lambda: log.read_text().splitlines()


needs_ninja = pytest.mark.skipif(
    not any(
        Path(folder, "ninja").exists()
        for folder in (*os.environ["PATH"].split(os.pathsep), Path(sys.executable).parent)
    ),
    reason="ninja is not installed",
)


@needs_ninja
def test_builds_once_for_each_target_and_shows_progress(pretender, capfd):
    first = build.cached(["90a"])
    assert first.read_text() == "compiled"
    lines = pretender[1]()
    assert len(lines) == len(build.sources()) + 1  # and the link
    assert all("sm_90a" in line and "sm_80" not in line for line in lines if " -c " in line)
    shown = capfd.readouterr().err
    assert "compiling the CUDA kernels for sm_90a" in shown
    assert f"[{len(lines)}/{len(lines)}]" in shown
    assert build.cached(["90a"]) == first
    assert len(pretender[1]()) == len(lines)
    assert build.cached(["80"]) != first
    assert not [p for p in build.cache_folder().rglob("*") if p.name.startswith("tmp")]


@needs_ninja
def test_a_library_for_more_targets_serves_each(pretender):
    every = build.cached(["80", "90a"])
    assert build.cached(["90a"]) == build.cached(["80"]) == every


@needs_ninja
def test_of_two_that_want_it_one_builds(pretender):
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(build.cached, [["90a"]] * 4))
    assert len(set(found)) == 1
    assert len(pretender[1]()) == len(build.sources()) + 1


@needs_ninja
def test_a_change_of_the_sources_is_built_anew(pretender, monkeypatch):
    first = build.cached(["90a"])
    monkeypatch.setattr(build, "source_hash", lambda: "another")
    assert build.cached(["90a"]) != first


@needs_ninja
def test_other_flags_are_built_anew(pretender, monkeypatch):
    first = build.cached(["90a"])
    monkeypatch.setenv("MAL_NVCC_FLAGS", "-DMAL_MMA_SYNC")
    build.source_hash.cache_clear()
    try:
        assert build.cached(["90a"]) != first
    finally:
        build.source_hash.cache_clear()
    compiled = [line for line in pretender[1]() if " -c " in line]
    assert sum("-DMAL_MMA_SYNC" in line for line in compiled) == len(compiled) // 2


@needs_ninja
def test_an_error_comes_with_its_log_and_leaves_nothing(pretender):
    pretender[0](broken="library")
    with pytest.raises(
        BackendUnavailable, match=r"(?s)do not compile .*expected a semicolon"
    ) as info:
        library.load.__wrapped__((9, 0))
    log = Path(re.search(r"\((/.*?)\)", str(info.value)).group(1))
    assert "expected a semicolon" in log.read_text()
    assert build.find_cached(["90a"]) is None
    pretender[0]()
    assert build.cached(["90a"]).exists()


def test_no_compiler(pretender, monkeypatch, tmp_path):
    (tmp_path / "bin/nvcc").unlink()
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    with pytest.raises(BackendUnavailable, match=r"nvcc is not in CUDA_HOME.*install the CUDA"):
        library.load.__wrapped__((9, 0))
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    with pytest.raises(BackendUnavailable, match=r"ninja is not installed: pip install"):
        library.load.__wrapped__((9, 0))


@pytest.mark.parametrize("capability", [(7, 5), (12, 0), (9, 5)])
def test_a_gpu_that_the_kernels_are_not_written_for(capability):
    major, minor = capability
    with pytest.raises(
        BackendUnavailable, match=rf"capability {major}.{minor}; .* for 80, 90a, 100"
    ):
        library.load.__wrapped__(capability)


def test_targets_of_gpus():
    gpus = {(8, 0): "80", (8, 6): "80", (8, 9): "80", (9, 0): "90a", (10, 0): "100", (10, 3): "100"}
    assert {gpu: build.target_of(gpu) for gpu in gpus} == gpus


class Pretended:
    """A library as far as its versions go."""

    mal_runtime_version = staticmethod(lambda: 13000)


@pytest.mark.parametrize("driver", [0, 12080])
def test_a_driver_that_is_too_old(driver):
    Pretended.mal_driver_version = staticmethod(lambda: driver)
    supports = "CUDA 12" if driver else "none: no NVIDIA driver"
    with pytest.raises(
        BackendUnavailable, match=rf"with CUDA 13 and the driver supports {supports}"
    ):
        library.check_driver(Pretended)
    Pretended.mal_driver_version = staticmethod(lambda: 13020)
    assert library.check_driver(Pretended) is Pretended


def structs():
    """The fields of every argument struct of the C interface, in order."""
    text = re.sub(r"//.*", "", (build.source_folder() / "mal_kernels.h").read_text())
    bodies = dict(re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL))

    def fields(body):
        for kind, star, names in re.findall(r"(?:const )?(\w+)(\*?) ([\w, ]+);", body):
            for name in names.split(", "):
                if kind == "mal_memory_call":
                    yield from fields(bodies[kind])
                elif kind in bodies:
                    yield from (f"{name}_{part}" for part in fields(bodies[kind]))
                else:
                    assert star or kind in ("int64_t", "double"), f"{name} is not 8 bytes wide"
                    yield name

    return {
        name.removesuffix("_args"): [*fields(body)]
        for name, body in bodies.items()
        if name.endswith("_args")
    }


def test_launchers_pass_the_fields_of_the_interface(monkeypatch):
    # they are packed in the order in which they are named
    passed = {}
    monkeypatch.setattr(
        library, "launch", lambda function, device, **fields: passed.update({function: [*fields]})
    )
    from mal_kernels._cuda import (
        aligned_residual_read,
        momentum_scan,
        neural_memory,
    )

    x, gate = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    call = ScanCall(x, gate, gate, [x[:, 0], x[:, 0]], None)
    momentum_scan.scan_fwd(call)
    momentum_scan.scan_bwd(x, x, x, x, call)
    state = [torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 5, 4)]
    x = x.half()
    call = MemoryCall(x, x, x, *[gate] * 3, state, state, [], [], chunk_size=8, activation="relu")
    neural_memory.memory_fwd(call, keeps=False)
    neural_memory.memory_bwd(x, gate, state, state, [], call)
    monkeypatch.setattr(aligned_residual_read, "multiprocessors", lambda _: 132)
    index = torch.zeros(2, dtype=torch.int64)
    read = AlignedCall(x[0], index, index, state, [x] * 4, "relu", False)
    aligned_residual_read.aligned_fwd(read)
    assert {name: [*fields, "stream"] for name, fields in passed.items()} == structs()


# --- with nvcc ------------------------------------------------------------------------------------

# registers that a thread may have, by kernel, for the GPU that the kernels were written for
REGISTERS = {"forward": 128, "backward": 168, "aligned_residual_read": 160}
REGISTERS |= {"neural_memory_fwd": 255, "write_bwd": 255, "causal_read_bwd": 192}


needs_nvcc = pytest.mark.skipif(
    not is_found(build.find_nvcc, build.find_ninja), reason="nvcc or ninja is not installed"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library for all targets, and what ptxas said."""
    out = tmp_path_factory.mktemp("cuda") / "libmal_kernels.so"
    return out, build.build(build.TARGETS, out, ["-Xptxas=-v", *build.GATE])


@pytest.mark.slow
@needs_nvcc
def test_compiles_for_every_target_without_spills(compiled):
    # the gate has failed the build if a kernel spills; this reads what else ptxas says
    found = build.costs(compiled[1])
    assert {cost.target for cost in found} == set(build.TARGETS)
    for cost in found:
        assert (cost.stack, cost.spills) == (0, 0), cost
        if cost.target == "90a":
            name = cost.kernel.split("<")[0].split("::")[-1]
            assert cost.registers <= REGISTERS[name], cost


@pytest.mark.slow
@needs_nvcc
def test_hopper_multiplies_by_warpgroup(compiled):
    # ptxas neither serialises wgmma nor adds to it
    assert not re.search(r"C7\d{3}|wgmma|warpgroup", compiled[1])
    pytest.importorskip("triton")  # cuobjdump comes with it
    from mal_kernels._triton.aot import rewritten_operands, sass_of

    sass = sass_of(compiled[0], "-arch", "sm_90a")
    codes = dict(re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", sass, re.DOTALL))
    codes = {name: code for name, code in codes.items() if "memory_" in name}
    assert len(codes) == 12  # three kernels of two types and two widths
    for name, code in codes.items():
        by_warpgroup, by_warp = (len(re.findall(rf"\s{x}\.", code)) for x in ("HGMMA", "HMMA"))
        assert by_warpgroup >= 40, name
        assert not [*rewritten_operands(code)], name
        if "Li64E" in name and "causal_read" not in name:  # else W2 has 32 rows
            assert by_warp == 0, name


@pytest.mark.slow
@needs_nvcc
def test_the_library_loads_where_there_is_no_driver(compiled):
    opened = library.opened(compiled[0])
    assert library.ctypes.string_at(opened.mal_targets()).decode().split() == [*build.TARGETS]
    assert opened.mal_runtime_version() >= 12080
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match=r"no NVIDIA driver is loaded"):
            library.check_driver(opened)
        fields = dict.fromkeys(structs()["mal_momentum_scan_fwd"], 1)
        error = packing.call(opened, "mal_momentum_scan_fwd", **fields)
        assert b"driver" in library.ctypes.string_at(opened.mal_error(error))


@needs_nvcc
def test_the_gate_sees_a_spill(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) f(float* x) {\n"
        "  float y[96];\n"
        "  for (int i = 0; i < 96; i++) y[i] = x[i];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 96; i++) x[i + threadIdx.x] = y[95 - i];\n"
        "}\n"
    )
    command = [build.find_nvcc(), "-arch=sm_90a", "-c", str(source), "-o", "/dev/null"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert subprocess.run([*command, *build.GATE], capture_output=True).returncode


def test_the_command_says_what_is_missing(tmp_path):
    environment = os.environ | {"CUDA_HOME": "", "PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    code = (
        "import runpy, sys; from mal_kernels._cuda import build;"
        "build.find_nvcc = lambda: (_ for _ in ()).throw(build.BuildError('no nvcc'));"
        "sys.argv[1:] = ['--targets', '80'];"
        "runpy.run_module('mal_kernels._cuda', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (1, "error: no nvcc")
