import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mal_kernels import __version__, ops
from mal_kernels._cuda import build
from mal_kernels.cli import app
from tests.support.process import run_python


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_doctor_lists_every_op_with_its_backend_and_the_reason():
    result = invoke("doctor")
    assert result.exit_code == 0
    for op in ("memory_read", "memory_update", "neural_memory", "momentum_scan"):
        backend, why = ops.explain(op)
        (line,) = [line for line in result.output.splitlines() if f" {op} " in line]
        assert backend in line
        assert why in line
    assert "transformers" in result.output
    assert "cpu" in result.output


def test_doctor_says_what_is_wrong_with_the_environment(monkeypatch):
    monkeypatch.setenv("MAL_BACKEND", "tritno")
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "cannot be used: MAL_BACKEND: got 'tritno'" in result.output


def test_doctor_compiles_the_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from mal_kernels._triton import aot, decode

    few = SimpleNamespace(EXAMPLES=dict([*decode.EXAMPLES.items()][:1]))
    monkeypatch.setattr(aot, "kernel_modules", lambda: {"decode": few})
    log = (
        "ptxas info    : Compiling entry function 'void mal::scan::(anonymous namespace)::"
        "forward<float>(mal_momentum_scan_fwd_args)' for 'sm_80'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 126 registers, used 1 barriers\n"
    )
    monkeypatch.setattr(build, "build", lambda targets, *_: log if targets == ["80"] else "")
    result = invoke("doctor", "--kernels", "--target", "sm_80")
    assert result.exit_code == 0
    (report,) = aot.reports(few, "sm_80")
    (line,) = [line for line in result.output.splitlines() if "decode_fwd_kernel" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    numbers = [report.registers, report.spills, report.shared, report.mma]
    assert cells == [report.kernel, report.example, *map(str, numbers)]
    (line,) = [line for line in result.output.splitlines() if "scan::forward<float>" in line]
    assert line.strip("│").replace("│", " ").split() == ["scan::forward<float>", "126", "8", "20"]


@pytest.mark.parametrize(
    ("interpret", "target", "message"),
    [("1", "sm_90", "unset it"), ("0", "sm_90a", "got 'sm_90a', expected one of")],
)
def test_doctor_says_why_it_compiles_nothing(interpret, target, message, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    result = invoke("doctor", "--kernels", "--target", target)
    assert result.exit_code == 1
    assert message in result.stderr


def test_errors_are_messages_and_not_tracebacks(tmp_path):
    result = invoke("demo", str(tmp_path / "missing.wav"))
    assert result.exit_code == 1
    assert "AudioFileError" in result.stderr
    assert "missing.wav" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [("--help",), ("demo", "--help"), ("doctor", "--help")])
def test_help(command):
    result = invoke(*command)
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_does_not_load_the_demo():
    code = "import sys, json, mal_kernels.cli; print(json.dumps(list(sys.modules)))"
    loaded = set(json.loads(run_python(code)))
    assert not loaded & {"transformers", "matplotlib", "soundfile", "mal_kernels.demo.show"}


def test_version():
    result = invoke("--version")
    assert result.output == f"mal-kernels {__version__}\n"


def test_the_study_has_the_help_and_the_errors_of_its_own(tmp_path):
    assert "gated-speaker" in invoke("ser", "arms").output
    result = invoke("ser", "check", "--corpus", "iemocap", "--root", str(tmp_path))
    assert result.exit_code == 1
    assert "CorpusError: root is" in result.stderr
    assert "Traceback" not in result.stderr
