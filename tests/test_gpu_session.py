"""The GPU session in miniature, what it concludes from results, and that ``auto`` follows those."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from bench import gpu, gpu_report
from mal_kernels.ops import _backend


@pytest.fixture
def session(tmp_path):
    return gpu.Session(tmp_path / "gpu.json", tmp_path, True, time.monotonic() + 60)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# --- the run of a session -------------------------------------------------------------------------


def test_a_dry_run_measures_in_miniature_and_says_so(tmp_path):
    steps = ("environment", "read", "memcheck", "ncu")
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path)]
    command += [word for step in steps for word in ("--step", step)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert result["environment"]["dry_run"] is True
    assert "dry run" in result["environment"]["device"]
    assert result["steps"]["read"]["status"] == "passed"
    row = result["timings"]["read ×1"]
    assert set(row["forward_ms"]) == {"triton, graph", "triton", "reference"}
    assert row["relative_error"] < 1e-2
    assert all(target["met"] is None for target in result["targets"])
    assert not (tmp_path / "measured.json").exists()
    assert "read ×1" in done.stdout


def test_a_dry_run_never_writes_among_the_results():
    arguments = ["--dry-run", "--out", str(gpu.ROOT / "bench/results")]
    app = gpu.typer.Typer()
    app.command()(gpu.main)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "belongs into bench/results" in " ".join(done.output.replace("│", " ").split())


def test_how_a_step_ends(session):
    assert session.run("fine", python("print('well')"), 20) == "passed"
    assert session.run("wrong", python("raise ValueError('that is why')"), 20).endswith(
        "that is why"
    )
    assert "timed out after 1 s" in session.run("slow", python("import time; time.sleep(60)"), 1)
    session.deadline = time.monotonic()
    assert session.run("late", python("1"), 20) == "skipped"
    assert [*json.loads(session.out.read_text())["steps"]] == ["fine", "wrong", "slow", "late"]


def test_what_a_stopped_step_had_found_is_kept(session, monkeypatch):
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{}'); 1 / 0"
    found = '{"read ×1": {"op": "memory_read"}}'
    monkeypatch.setattr(gpu, "PYTHON", sys.executable)
    stock = session.run
    session.run = lambda step, command, limit: stock(
        step, [*python(code.replace("'{}'", repr(found))), command[-1]], limit
    )
    session.result["timings"] = {}
    gpu.timed(session, "read", set())
    assert "ZeroDivisionError" in session.result["steps"]["read"]["status"]
    assert session.result["timings"] == {"read ×1": {"op": "memory_read"}}


def test_an_op_that_is_wrong_is_not_timed(session):
    gpu.timed(session, "write", {"memory_update"})
    assert (
        session.result["steps"]["write"]["status"]
        == "skipped: parity tests of memory_update failed"
    )


def test_outcomes_of_both_of_pytest_s_notations():
    log = """
tests/test_triton_ops.py::test_memory_read[one token-torch.float32] PASSED [ 1%]
tests/test_triton_neural_memory.py::test_parity[plain] FAILED           [ 2%]
[gw3] [  3%] PASSED tests/test_triton_ops.py::test_strided_indices
[gw0] [  4%] ERROR tests/test_triton_ops.py::test_opcheck[momentum_scan x]
"""
    found = gpu.outcomes(log)
    assert found["memory_read"] == {"passed": 2, "failed": []}
    for op in ("neural_memory", "memory_update"):
        assert found[op]["failed"] == ["tests/test_triton_neural_memory.py::test_parity[plain]"]
    assert len(found["momentum_scan"]["failed"]) == 1


# --- conclusions ----------------------------------------------------------------------------------


def a_result():
    def ms(**medians):
        return {name: {"median": x} for name, x in medians.items()}

    row = dict(op="neural_memory", dtype="torch.bfloat16", features=64, tokens=262144)
    train = row | dict(
        forward_tflop=4.0,
        forward_ms=ms(triton=10, reference=30),
        forward_backward_ms=ms(triton=100, reference=90),
        peak_bytes={"triton": 4},
        saved_state_bytes=2,
    )
    turn = dict(op="memory_read", dtype="torch.bfloat16", features=64, tokens=112)
    turn["forward_ms"] = ms(triton=0.02, reference=0.3)
    return {
        "environment": dict(dry_run=False, architecture="sm_90", device="a GPU", commit="abc"),
        "parity": {op: {"passed": 9, "failed": []} for op in _backend.TRITON_OPS},
        "ceilings": {"tflops": 800},
        "timings": {"train": train, "read ×1": turn},
    }


def test_targets_are_met_or_missed_by_number():
    rows = {row["target"]: row for row in gpu_report.targets(a_result())}
    first = rows["forward, share of the bf16 matmul rate"]
    assert (first["measured"], first["met"]) == (0.5, True)
    second = rows["forward+backward, likewise"]
    assert (second["measured"], second["met"]) == (pytest.approx(0.15), False)
    assert rows["peak memory over the saved states"]["met"] is False
    assert rows["write of a turn, µs"]["measured"] is None


def test_only_what_is_right_and_faster_is_proposed():
    (entry,) = gpu_report.measured(a_result())
    assert (entry["op"], entry["speedup"]) == ("memory_read", [15.0])
    wrong = a_result()
    wrong["parity"]["memory_read"]["failed"] = ["a test"]
    assert gpu_report.measured(wrong) == []
    untested = a_result()
    del untested["parity"]
    assert gpu_report.measured(untested) == []


# --- auto -----------------------------------------------------------------------------------------

CALL = dict(dtype=torch.bfloat16, features=64, tokens=112)


@pytest.fixture
def on_hopper(monkeypatch):
    """``auto`` on a GPU for which one result is committed."""
    monkeypatch.delenv("MAL_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "MEASURED", gpu_report.measured(a_result()))
    monkeypatch.setattr(_backend, "architecture", lambda device: "sm_90")

    def resolve(op="memory_read", device="cuda", limit=None, backend="auto", **call):
        return _backend.resolve(backend, op, torch.device(device), limit, **(CALL | call))

    return resolve


def test_auto_follows_committed_results(on_hopper, monkeypatch):
    pytest.importorskip("triton")
    assert on_hopper() == "triton"
    assert on_hopper(tokens=400) == on_hopper(tokens=28) == on_hopper(features=40) == "triton"
    for unlike in (
        dict(tokens=500),
        dict(tokens=27),
        dict(features=32),
        dict(features=65),
        dict(dtype=torch.float32),
        dict(op="memory_update"),
        dict(device="cpu"),
        dict(limit="too deep"),
        dict(backend="reference"),
    ):
        assert on_hopper(**unlike) == "reference", unlike
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _backend.explain("memory_read")[0] == "triton"
    assert "112 tokens" in _backend.explain("memory_read")[1]
    monkeypatch.setattr(_backend, "architecture", lambda device: "sm_80")
    assert on_hopper() == "reference"
    assert "no committed GPU result" in _backend.explain("memory_read")[1]


def test_auto_compiles_whole(on_hopper):
    def function(x):
        return x + (on_hopper(dtype=x.dtype, features=x.shape[1], tokens=x.shape[0]) == "triton")

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((112, 64), (60, 50), (5, 64), (112, 80)):
        x = torch.zeros(shape, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), function(x))
    assert function(torch.zeros(112, 64, dtype=torch.bfloat16)).all()


def test_the_environment_overrides_results(on_hopper, monkeypatch):
    monkeypatch.setenv("MAL_BACKEND", "reference")
    assert on_hopper() == "reference"


def test_what_is_committed_is_complete():
    keys = {"op", "dtype", "features", "tokens", "architecture", "device", "commit", "speedup"}
    assert all(set(entry) == keys for entry in _backend.MEASURED)
