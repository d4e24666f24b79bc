"""Finding, building and keeping the CPU library: a compiler that only pretends, and none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mal_kernels import BackendUnavailable, ops
from mal_kernels._cpu import build, library
from mal_kernels._native.build import BuildError, cache_folder
from mal_kernels.testing import make_inputs
from tests.support.process import run_python

ROOT = Path(__file__).parents[2]
PRETENDER = """#!{python}
import sys, pathlib
out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
with open({log!r}, "a") as log: log.write(" ".join(sys.argv[1:]) + chr(10))
if {broken!r} in sys.argv: sys.exit("error: expected a semicolon")
out.write_text("compiled")
"""


@pytest.fixture
def pretender(tmp_path, monkeypatch):
    """Installs a compiler that logs its arguments; returns how to, and the lines of the log."""
    log = tmp_path / "log"
    log.touch()
    compiler = tmp_path / "c++"
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(broken="nothing"):
        compiler.write_text(PRETENDER.format(python=sys.executable, log=str(log), broken=broken))
        compiler.chmod(0o755)
        build.source_hash.cache_clear()

    install()
    yield install, lambda: log.read_text().splitlines()
    build.source_hash.cache_clear()


@pytest.fixture
def no_library(monkeypatch):
    """A machine on which the library is not loaded yet."""
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    library._missing.cache_clear()
    yield
    library._missing.cache_clear()


def test_builds_once_for_each_target_and_says_so(pretender, capfd):
    first = build.cached("avx2")
    assert first.read_text() == "compiled"
    assert "mal_kernels: compiling the CPU kernels (avx2) with " in capfd.readouterr().err
    assert build.cached("avx2") == first
    (line,) = pretender[1]()
    assert "-mavx2" in line
    assert "-fopenmp" in line
    assert build.cached("portable") != first
    assert "-mavx2" not in pretender[1]()[1]


def test_of_two_that_want_it_one_builds(pretender):
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(build.cached, ["avx2"] * 4))
    assert len(set(found)) == len(pretender[1]()) == 1


def test_a_compiler_without_openmp_makes_a_library_for_one_thread(pretender):
    pretender[0](broken="-fopenmp")
    assert build.cached("portable").read_text() == "compiled"
    assert ["-fopenmp" in line for line in pretender[1]()] == [True, False]


def test_what_lies_in_the_cache_is_the_users_alone(pretender, monkeypatch):
    before = os.umask(0)
    try:
        found = build.cached("avx2")
    finally:
        os.umask(before)
    for path in (found, *found.parents[:2], *cache_folder().glob("*.lock")):
        assert path.stat().st_mode & 0o077 == 0, path
    cache_folder().chmod(0o777)
    with pytest.raises(BuildError, match=r"others can write to .*chmod go-w"):
        build.cached("avx2")
    found.parents[1].chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(BuildError, match="belongs to another user; set XDG_CACHE_HOME"):
        build.cached("avx2")


def test_a_home_that_cannot_be_written_is_a_reason(pretender, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot be made: .*set XDG_CACHE_HOME"):
        build.cached("avx2")


def test_an_error_comes_with_what_the_compiler_said_and_is_not_tried_again(
    pretender, no_library, monkeypatch
):
    monkeypatch.delenv("MAL_BACKEND", raising=False)
    pretender[0](broken="-shared")
    *args, options = make_inputs(dtype=torch.float32)
    for _ in range(2):
        backend, why = ops.explain("neural_memory")
        assert backend == "reference"
        assert "does not compile the CPU kernels" in why
        assert "expected a semicolon" in why
        ops.neural_memory(*args, **options)
    assert len(pretender[1]()) == 2  # with OpenMP and without
    assert not [*cache_folder().rglob("*.so")]


def test_a_library_that_cannot_be_loaded_is_a_reason(pretender, no_library):
    assert "cannot be loaded" in library.missing()


def test_without_a_compiler_the_portable_path_serves_and_says_why(
    pretender, no_library, monkeypatch
):
    monkeypatch.delenv("MAL_BACKEND", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    why = "there is no C++ compiler: install g++ or clang++, or set CXX"
    assert ops.explain("neural_memory") == ("reference", why)
    *args, options = make_inputs(dtype=torch.float32)
    auto = ops.neural_memory(*args, **options)
    portable = ops.neural_memory(*args, **options, backend="reference")
    assert torch.equal(auto.output, portable.output)
    with pytest.raises(BackendUnavailable, match="backend='cpu': there is no C"):
        ops.neural_memory(*args, **options, backend="cpu")


def without_a_compiler(tmp_path):
    """The environment of a machine that has neither a compiler nor a library."""
    away = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "200"}
    here = {n: x for n, x in os.environ.items() if n not in ("CXX", "MAL_BACKEND")}
    return here | away | {"PYTHONPATH": str(ROOT)}


def test_without_a_compiler_doctor_says_so_in_a_line_for_each_op(tmp_path):
    command = [sys.executable, "-m", "mal_kernels", "doctor"]
    done = subprocess.run(command, env=without_a_compiler(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "there is no C++ compiler" in line]
    assert len(lines) == 5
    assert all("reference" in line and "install g++ or clang++" in line for line in lines)


@pytest.mark.slow
def test_without_a_compiler_the_suite_passes(tmp_path):
    """A part of it, which calls every op with ``backend="auto"``."""
    env = without_a_compiler(tmp_path) | {"PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/memory", "-m", "not slow"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert not [*(tmp_path / "cache").rglob("*.so")]


def test_nothing_is_loaded_at_import_nor_by_another_backend():
    code = (
        "import sys, torch; from mal_kernels import MemoryState, ops; x = torch.ones(1, 2, 1, 3);"
        "state = MemoryState.from_weights((torch.ones(1, 1, 3, 3),)); gate = x[..., 0];"
        "ops.neural_memory(x, x, x, gate, gate, gate, state, backend='reference');"
        "print([m for m in sys.modules if m.startswith('mal_kernels._cpu')])"
    )
    assert run_python(code).strip() == "[]"


def test_one_runtime_of_openmp_is_loaded():
    if library.missing() or sys.platform != "linux":
        pytest.skip("no library here")
    # a process of its own: other packages, as scikit-learn, bring a runtime too
    code = (
        "import torch; from mal_kernels._cpu import library;"
        "library.load(library.target());"
        "maps = open('/proc/self/maps').read().splitlines();"
        "print(len({line.split()[-1] for line in maps if 'gomp' in line}))"
    )
    assert run_python(code).strip() == "1"


@pytest.mark.slow
@pytest.mark.parametrize("builds", [False, True])
def test_a_wheel_has_the_sources_and_if_asked_the_libraries(builds, tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "build", "tests", "docs"))
    if builds:
        monkeypatch.setenv("MAL_BUILD_CPU", "1")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(clone)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") != builds
    names = [name.split("/purelib/")[-1] for name in zipfile.ZipFile(wheel).namelist()]
    sources = [p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert {f"mal_kernels/{p}" for p in sources if "emu" not in p.parts} <= set(names)
    wanted = {f"mal_kernels/_cpu/{build.library_name(library.target())}"}
    assert wanted <= set(names) if builds else not wanted & set(names)
