"""The GPU session in miniature, what it concludes from results, and that ``auto`` follows those."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import schema
from bench.gpu import report as gpu_report
from bench.gpu import steps as gpu_steps
from mal_kernels.ops import _backend
from mal_kernels.testing.exercise import small_calls
from tests.gpu import session as gpu


@pytest.fixture
def session(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    return gpu.Session(tmp_path / "gpu.json", logs, True, time.monotonic() + 60)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# --- the run of a session -------------------------------------------------------------------------


def test_a_dry_run_measures_in_miniature_and_says_so(tmp_path):
    steps = ("environment", "read")
    command = [sys.executable, "-m", "tests.gpu.session", "--dry-run", "--out", str(tmp_path)]
    command += [word for step in steps for word in ("--step", step)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert result["environment"]["dry_run"] is True
    assert "dry run" in result["environment"]["device"]
    assert result["steps"]["read"]["status"] == "passed"
    row = result["timings"]["read ×1"]
    assert set(row["forward_ms"]) == {"triton, graph", "triton", "reference"}
    assert row["relative_error"]["triton"] < 1e-2
    assert all(target["met"] is None for target in result["targets"])
    assert not (tmp_path / "measured.json").exists()
    speeds = schema.layers(json.loads((tmp_path / "gpu-dry-run.speed.json").read_text()))
    assert {*speeds["read ×1"]["forward"]} == {*row["forward_ms"]}
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


def steps(session, code: str) -> None:
    """Runs ``code`` in the place of every step; argument 1 is the results' file, 2 the backends."""
    stock = session.run

    def run(step, command, limit):
        out, *backends = command[command.index("bench.gpu.steps") + 2 :]
        return stock(step, [*python(code), out, *backends], limit)

    session.run = run


WRITE = "import sys, pathlib, json; pathlib.Path(sys.argv[1]).write_text(json.dumps({}));"


def test_what_a_stopped_step_had_found_is_kept(session):
    row = {"read ×1": {"op": "memory_read"}}
    steps(session, WRITE.format(row) + "1 / 0")
    gpu.timed(session, "read")
    assert "ZeroDivisionError" in session.result["steps"]["read"]["status"]
    assert session.result["timings"] == row


def test_an_op_that_is_wrong_is_not_timed(session):
    steps(session, WRITE.format("{'found': {'backends': sys.argv[2:]}}"))
    session.fail("triton", ["memory_update"])
    gpu.timed(session, "write")
    skipped = session.result["steps"]["write triton"]["status"]
    assert skipped == "skipped: memory_update failed before"
    assert session.result["timings"]["found"]["backends"] == ["cuda"]
    session.fail("cuda", ["memory_update"])
    gpu.timed(session, "turn")
    assert "turn" not in session.result["steps"]
    assert session.result["failed"] == ["cuda memory_update", "triton memory_update"]


def test_what_is_wrong_where_it_is_timed_is_not_timed_again(session):
    steps(session, WRITE.format({"scan": {"wrong": {"cuda": "error 1"}}}) + "sys.exit('wrong')")
    gpu.timed(session, "scan")
    assert session.failed == {("cuda", "momentum_scan")}
    assert [*session.result["steps"]] == ["scan"]


def test_a_crash_costs_the_cuda_kernels_alone(session):
    code = "import sys; assert sys.argv[2:] == ['triton'], 'illegal memory access'"
    steps(session, code)
    gpu.timed(session, "scan")
    status = {name: step["status"] for name, step in session.result["steps"].items()}
    assert status["scan"].endswith("illegal memory access")
    assert status["scan without cuda"] == "passed"
    assert session.failed == {("cuda", "momentum_scan")}


def test_what_fails_without_them_too_is_not_blamed_on_them(session):
    steps(session, "1 / 0")
    gpu.timed(session, "scan")
    assert [*session.result["steps"]] == ["scan", "scan without cuda"]
    assert session.failed == set()


def test_without_the_library_nothing_of_cuda_is_timed(session, monkeypatch):
    session.run = lambda *_: "failed: no nvcc"
    gpu.build(session)
    assert session.failed == {("cuda", op) for op in _backend.CUDA_OPS}
    gpu.parity(session, "cuda")
    gpu.sanitize(session, "cuda")
    assert all(s["status"].startswith("skipped") for s in session.result["steps"].values())


def test_every_op_goes_through_every_sanitizer(session, monkeypatch):
    session.dry_run = False
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    calls = {}

    def run(step, command, limit, **environment):
        calls[step] = command
        assert environment == gpu.NO_CACHE
        return "failed: 9" if step == "racecheck_cuda_momentum_scan" else "passed"

    session.run = run
    gpu.sanitize(session, "cuda")
    names = [*_backend.CUDA_OPS]
    expected = {f"{tool}_cuda_{op}" for tool in gpu.TOOLS for op in names}
    assert {*calls} == expected | {f"{tool}_wrappers" for tool in gpu.TOOLS}
    assert calls["synccheck_wrappers"][-1] == "tests/kernels/test_cuda_wrappers.py"
    assert session.failed == {("cuda", "momentum_scan")}


def test_every_op_has_small_calls_and_is_timed():
    # so that a new one cannot be forgotten
    for op in {op for ops in gpu.OPS.values() for op in ops}:
        assert all(call() for call in small_calls(op, "reference"))
        assert any(op in timed for _, timed in gpu.TIMED.values()), op
    assert {*gpu.TIMED} <= {*gpu_steps.STEPS}


def test_outcomes_of_both_of_pytest_s_notations():
    log = """
tests/kernels/test_triton_ops.py::test_memory_read[one token-torch.float32] PASSED [ 1%]
tests/kernels/test_triton_neural_memory.py::test_parity[plain] FAILED           [ 2%]
[gw3] [  3%] PASSED tests/kernels/test_triton_ops.py::test_strided_indices
[gw0] [  4%] ERROR tests/kernels/test_triton_ops.py::test_opcheck[momentum_scan x]
"""
    found = gpu.outcomes(log, "triton")
    assert found["memory_read"] == {"passed": 2, "failed": []}
    for op in ("neural_memory", "memory_update"):
        assert found[op]["failed"] == [
            "tests/kernels/test_triton_neural_memory.py::test_parity[plain]"
        ]
    assert len(found["momentum_scan"]["failed"]) == 1
    assert not found["aligned_residual_read"]["failed"]
    assert gpu.outcomes(log, "cuda").keys() == {*_backend.CUDA_OPS}
    wrapper = "tests/kernels/test_cuda_wrappers.py::test_wrapper[mma bf16-compiled] FAILED"
    assert all(count["failed"] for count in gpu.outcomes(wrapper, "cuda").values())
    of_reads = "test_cuda_neural_memory_bwd.py::test_gradients_of_what_is_read[linear-cuda]"
    backward = f"tests/kernels/{of_reads} FAILED"
    found = gpu.outcomes(backward, "cuda")
    wrong = {op for op, count in found.items() if count["failed"]}
    assert wrong == {"memory_update", "neural_memory"}


BROKEN = """
def test_first(): pass
def test_second(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_third(): pass
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_device_costs_one_test(workers, tmp_path):
    path, names = tmp_path / "test_broken.py", tmp_path / "collected"
    path.write_text(BROKEN)
    command = [sys.executable, "-m", "pytest", "-v", "-n", str(workers), "--rootdir", str(tmp_path)]
    # not a worker of the xdist that runs this
    alone = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, *gpu.GUARDED, "-p", "no:cacheprovider", "-p", "no:randomly", str(path)],
        cwd=gpu.ROOT,
        env=alone | {"MAL_COLLECTED": str(names)},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert [name.split("::")[1] for name in names.read_text().split()] == [
        *("test_first", "test_second", "test_third")
    ]
    passed = re.findall(r"test_\w+ PASSED|PASSED \S+::test_\w+", done.stdout)
    assert len(passed) == (2 if workers else 1), done.stdout  # alone, the process is lost


def test_ops_without_a_full_verdict_are_failed_by_a_time_out(session):
    names = [
        "tests/kernels/test_triton_ops.py::test_memory_read[one]",
        "tests/kernels/test_triton_ops.py::test_momentum_scan[one]",
        "tests/kernels/test_triton_ops.py::test_momentum_scan[two]",
    ]

    def run(step, command, limit, **environment):
        (session.logs / f"{step}.log").write_text("\n".join(f"{n} PASSED" for n in names[:2]))
        Path(environment["MAL_COLLECTED"]).write_text("\n".join(names))
        return "timed out after 240 s"

    session.run = run
    gpu.parity(session, "triton")
    assert session.failed == {("triton", "momentum_scan")}


def test_the_plan_of_two_calls():
    app = typer.Typer()
    app.command()(gpu.main)
    done = CliRunner().invoke(app, ["--plan"])
    assert done.exit_code == 0
    for limit, budgets in gpu.CALLS.values():
        assert sum(budgets.values()) <= limit
        assert all(step in done.stdout for step in budgets)
    assert [limit for limit, _ in gpu.CALLS.values()] == [330, 400]
    # whatever a session does is in one of the calls
    calls = {step for _, budgets in gpu.CALLS.values() for step in budgets}
    assert {*gpu.TIMED, "parity_cuda", "parity_triton", "wrappers"} <= calls


def test_a_step_leaves_the_later_ones_their_time(session):
    session.deadline = time.monotonic() + 30
    session.reserved = 28
    assert session.run("late", python("pass"), 10) == "skipped"
    session.reserved = 0
    assert session.run("now", python("pass"), 10) == "passed"


def test_two_calls_make_one_result():
    first = a_result() | {"failed": ["cuda neural_memory"]}
    second = {"parity": {}, "timings": {"late": {}}, "steps": {}, "failed": []}
    second["environment"] = first["environment"]
    both = gpu_report.merged(first, second)
    assert both["timings"] == first["timings"] | {"late": {}}
    assert both["parity"] == first["parity"]
    assert both["failed"] == ["cuda neural_memory"]


def test_names_of_kernels():
    cuda = "void mal::memory::(anonymous namespace)::write<__half, 64>(mal_neural_memory_fwd_args)"
    assert gpu_steps.kernel_name(cuda) == "write"
    assert gpu_steps.kernel_name("write_fwd_kernel") == "write_fwd_kernel"


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
        "parity": {"triton": {op: {"passed": 9, "failed": []} for op in _backend.TRITON_OPS}},
        "ceilings": {"tflops": 800, "gigabytes_per_s": 4000},
        "timings": {"train": train, "read ×1": turn},
    }


def test_targets_are_met_or_missed_by_number():
    result = a_result()
    train = result["timings"]["train"]
    train["forward_ms"]["cuda"] = {"median": 8}
    result["timings"]["scan"] = {"gigabytes_per_s": {"cuda": 3400.0, "triton": 1.0}}
    result["timings"]["turn ×1"] = {"forward_ms": {"cuda, graph": {"median": 0.06}}}
    rows = {(row["backend"], row["target"]): row for row in gpu_report.targets(result)}

    def found(backend, target):
        row = rows[backend, target]
        return row["measured"], row["met"]

    assert found("triton", "forward, share of the bf16 matmul rate") == (0.5, True)
    assert found("triton", "forward+backward, likewise") == (pytest.approx(0.15), False)
    assert found("triton", "peak memory over the saved states") == (2, False)
    assert found("triton", "write of a turn, µs") == (None, None)
    assert found("cuda", "forward, share of the bf16 matmul rate") == (0.625, True)
    assert found("cuda", "forward+backward, likewise") == (None, None)
    assert found("cuda", "scan, share of the copy bandwidth") == (0.85, True)
    assert found("cuda", "read and write of a turn, µs") == (60, True)
    result["targets"] = [*rows.values()]
    train["wrong"] = {"cuda": "error 1"}
    console = gpu_report.Console(record=True, width=100)
    gpu_report.show(console, result)
    assert "error 1" in console.export_text()


def test_only_what_is_right_and_faster_is_proposed():
    (entry,) = gpu_report.measured(a_result())
    assert (entry["op"], entry["speedup"]) == ("memory_read", [15.0])
    wrong = a_result()
    wrong["failed"] = ["triton memory_read"]
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
    committed = gpu_report.measured(a_result())
    monkeypatch.setattr(_backend, "measured", lambda: committed)
    monkeypatch.setattr(_backend, "architecture", lambda device: "sm_90")

    def resolve(op="memory_read", device="cuda", limit=None, backend="auto", **call):
        name, why = _backend.resolve(backend, op, torch.device(device), limit, **(CALL | call))
        assert why
        return name

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
        dict(limit="too deep"),
        dict(backend="reference"),
    ):
        assert on_hopper(**unlike) == "reference", unlike
    assert on_hopper(device="cpu") in ("cpu", "reference")  # with a compiler, without one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _backend.explain("memory_read")[0] == "triton"
    assert "112 tokens" in _backend.explain("memory_read")[1]
    monkeypatch.setattr(_backend, "architecture", lambda device: "sm_80")
    assert on_hopper() == "reference"
    assert "no committed GPU result" in _backend.explain("memory_read")[1]


def test_auto_takes_cuda_where_it_is_faster_than_triton(on_hopper, monkeypatch):
    pytest.importorskip("triton")
    result = a_result()
    ms = result["timings"]["read ×1"]["forward_ms"]
    result["parity"]["cuda"] = result["parity"]["triton"]
    ms["cuda"] = {"median": 0.03}
    assert [entry["backend"] for entry in gpu_report.measured(result)] == ["triton"]
    ms["cuda"] = {"median": 0.01}
    monkeypatch.setattr(_backend, "CUDA_OPS", ("memory_read",))
    committed = gpu_report.measured(result)
    monkeypatch.setattr(_backend, "measured", lambda: committed)
    assert [entry["backend"] for entry in committed] == ["triton", "cuda"]
    assert on_hopper() == "cuda"
    assert on_hopper(cuda_limit="no backward") == "triton"


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
    keys = {
        "backend",
        "op",
        "dtype",
        "features",
        "tokens",
        "architecture",
        "device",
        "commit",
        "speedup",
    }
    assert all(set(entry) == keys for entry in _backend.measured())
