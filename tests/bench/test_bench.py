"""The benchmark itself: it refuses to time what does not agree, and publishes what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import figures, interleaved, providers, report, schema, targets
from bench.__main__ import app, load, save
from bench.cases import CASES, HOSTS, OPS, Case, Turn, tensors
from bench.providers import EAGER, OURS, PROVIDERS, THEIRS
from bench.questions import error, overhead, state
from mal_kernels import MALAdapter, cli
from mal_kernels.testing.hosts import narrow

ROOT = Path(__file__).parents[2]
HERE = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
PUBLISHED = ROOT / "bench/results/cpu-2-threads"
TINY = Case("tiny", heads=2, tokens=8, head_dim=4, hidden_dim=8, chunk_size=4)
RATES = {"float32_gflop_per_s": 10.0, "bfloat16_gflop_per_s": 10.0, "copy_gb_per_s": 5.0}
BLOCKS = [*report.BLOCKS, *(f"picture_{name}" for name in figures.FIGURES)]


# --- speed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PROVIDERS])
def test_every_provider_agrees_with_the_reference(name, monkeypatch):
    # compiling takes longer than all tests here
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    errors = providers.checked(PROVIDERS[name], TINY)[1]
    assert errors["forward"] <= 1e-5
    assert errors["gradients"] <= 1e-4


def test_what_disagrees_is_refused():
    right = OURS.build
    wrong = replace(EAGER, build=lambda case: lambda q, *rest: right(case)(1.001 * q, *rest))
    with pytest.raises(AssertionError, match="outputs differ by"):
        providers.checked(wrong, TINY)


RUN = """
from bench import cases, providers
from dataclasses import replace
tiny = cases.Case("base", heads=2, tokens=8, head_dim=4, hidden_dim=8, chunk_size=4)
cases.CASES.clear(); cases.CASES["base"] = tiny; cases.PEERS = (tiny,)
cases.OPS = {case.name: case for case in cases.layer_ops(tiny)}
right = providers.OURS.build
wrong = lambda case: lambda q, *rest: right(case)(1.001 * q, *rest)
wrong = replace(providers.EAGER, build=wrong)
for name in [*providers.PROVIDERS]:
    if "compile" in name: del providers.PROVIDERS[name]
providers.PROVIDERS[wrong.name] = wrong
import pytest, sys
options = ["-q", "-n", "0", "--benchmark-max-time=0.01", "--benchmark-json", sys.argv[1]]
sys.exit(pytest.main(["bench/test_speed.py", *options]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of pytest-benchmark on a tiny case, in which one provider is wrong."""
    path = tmp_path_factory.mktemp("speed") / "speed.json"
    command = [sys.executable, "-c", RUN, str(path)]
    # a worker of xdist hands on its name, and pytest-benchmark does not time in one
    alone = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert path.exists(), done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text())


@pytest.mark.slow
def test_pytest_benchmark_times_what_agrees(run):
    printed, speed = run
    agreeing = {n for n in PROVIDERS if "compile" not in n} - {EAGER.name}
    found = schema.layers(speed)["base"]
    assert {*found["forward"]} == {*found["forward_backward"]} == agreeing
    assert "outputs differ by" in printed
    assert all(q["p20"] <= q["median"] <= q["p80"] for q in found["forward"].values())
    ops = schema.ops(speed)
    assert {row["params"]["case"].split(",")[0] for row in ops.values()} == {
        *("neural_memory", "memory_read", "momentum_scan")
    }
    for row in speed["benchmarks"]:
        assert {"flops", "bytes", "relative_error"} <= {*row["extra_info"]}
        assert "data" not in row["stats"]


def test_the_json_says_where_and_names_no_computer(run):
    info = run[1]["machine_info"]
    assert {"cpu", "threads", "versions", "commit", "rates"} <= {*info}
    assert "node" not in info


def test_pytest_benchmark_compares_with_the_published_result(run, tmp_path):
    new = tmp_path / "new.json"
    schema.write(new, run[1])
    assert json.loads(new.read_text()) == run[1]
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(PUBLISHED / "speed.json")]
    command += [str(new), "--columns=median,rounds", "--sort=fullname", "--group-by=fullname"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    name = f"test_layer[base-{OURS.name}-forward]"
    (table,) = (t for t in done.stdout.split(" benchmark ") if t.count(name) >= 3)
    assert "2 tests" in table


def test_what_is_not_known_is_not_made_up():
    (row,) = (
        r for r in load(PUBLISHED)["speed"]["benchmarks"] if r["name"].startswith("test_op[neural")
    )
    assert row["stats"]["mean"] != row["stats"]["mean"]
    assert row["stats"]["rounds"] > 0


def test_quantiles():
    ms = {"fast": [1.0, 3.0, 2.0], "slow": [9.0]}
    assert interleaved.quantiles(ms["fast"])["median"] == 2.0
    only = interleaved.quantiles(ms["slow"])
    assert only == {"p20": 9.0, "median": 9.0, "p80": 9.0, "calls": 1}


def test_work_grows_with_the_case():
    # by hand, D=64, E=128, C=64, per chunk and head: 11·C·D·E + 2·C²·(D+E) multiply-adds
    assert Case("one", heads=1, tokens=64).flops("token") == 2 * (5_767_168 + 1_572_864)
    assert Case("two").flops("chunk") == 2 * Case("one", tokens=256).flops("chunk")
    # a part of a chunk has the products of its own tokens
    assert Case("part", heads=1, tokens=1).flops("token") == 2 * (11 * 64 * 128 + 2 * 192)
    read, write = Turn(HOSTS[-1], 1).ops()
    assert read.flops == 2 * 112 * (3 * 4096 * 256 + 2 * 4 * 64 * 128)
    assert write.flops == 2 * 112 * 4 * 5 * 64 * 128
    longer = max(write.flops / 1e10, write.bytes / 5e9)
    assert report.bound_ms(write, RATES) == pytest.approx(1e3 * longer)


def test_ops_of_a_turn_can_be_called():
    calls = Turn(replace(HOSTS[0], hidden=32, tokens=4), 2, 1, 8, 16).calls()
    for op in ("aligned_residual_read", "aligned_residual_read_", "memory_read", "memory_update"):
        assert tensors(calls[op](backend="reference"))


def test_slow_functions_are_called_less(monkeypatch):
    cost = {"fast": 1.0, "slow": 900.0}
    calls = []

    def once(function):
        calls.append(function())
        return cost[calls[-1]]

    found = interleaved.in_turns(
        {name: lambda name=name: name for name in cost}, seconds=0.1, rounds=5, most=7, once=once
    )
    assert found["fast"] == [1.0] * 35
    assert found["slow"] == [900.0] * 3
    assert calls[:11] == ["fast", "slow", *["fast"] * 7, "slow", "fast"]


def test_pairs_see_a_difference_that_noise_hides(monkeypatch):
    noise = iter(x for n in range(100) for x in (n * 7 % 13, n * 7 % 13))
    monkeypatch.setattr(interleaved, "wall_clock_ms", lambda f: f() + 100 * next(noise))
    found = interleaved.in_pairs(lambda: 10.0, lambda: 11.0, rounds=10)
    assert found["added"]["median"] == pytest.approx(1.0)


# --- questions ----------------------------------------------------------------------------------


def test_every_narrow_host_hears_its_clip(monkeypatch):
    monkeypatch.setitem(narrow.TOWER, "encoder_layers", 1)
    for name in overhead.TITLES:
        host = narrow.narrow_host(name, num_hidden_layers=1)
        prompt = narrow.narrow_inputs(name, seed=0)
        mal = MALAdapter().attach(host)
        with torch.no_grad(), overhead._tower_ms(host) as tower, mal.dialogue("x") as dialogue:
            host(**prompt, logits_to_keep=1)
        assert mal.last_turn.tokens == [narrow.TURN]
        assert dialogue.turns == [1]
        assert len(tower) == 1


def test_long_streams_do_not_drift():
    curves = error.ask(True, print)["relative_rms"]
    assert max(curves["mal_kernels, float32"]) < 1e-5
    assert max(curves["mal_kernels, bfloat16 tokens"]) < 0.05


def test_state_of_a_dialogue():
    (row,) = (r for r in state.ask(True, print)["rows"] if r["name"] == "Qwen2-Audio-7B")
    # four heads: two layers of 64 × 128, weights and momentum, and one position
    assert row["memory_bytes"] == pytest.approx(2 * 2 * 4 * 4 * 64 * 128, rel=0.01)
    assert row["wide_memory_bytes"] > 10 * row["memory_bytes"]


# --- what is published --------------------------------------------------------------------------


@pytest.fixture
def result():
    return load(PUBLISHED)


def test_targets_are_met_or_missed_by_their_numbers(result):
    ms = {"median": 0.001, "rounds": 9, "iterations": 1}
    for row in result["speed"]["benchmarks"]:
        if row["params"].get("case") == "base":
            row["stats"] |= ms
        if row["params"].get("provider") == THEIRS.name:
            row["stats"]["median"] = 0.160
    result["questions"]["overhead"]["Qwen2-Audio"] |= dict(
        share_of_prefill=0.5, share_of_decode=0.001
    )
    found = {row["target"]: row for row in targets.verdicts(targets.CPU, result)}
    assert found["forward, times titans-pytorch (T=512)"]["measured"] == pytest.approx(160.0)
    assert found["forward, times titans-pytorch (T=512)"]["met"] is True
    assert found["forward, times its chunk-gate mode"]["met"] is False
    assert found["% added to the prefill of a narrow Qwen2-Audio"]["met"] is False
    assert found["% added to its decode"]["met"] is True
    assert "| ≤ 6 | 50.00 | **missed** |" in report.targets_table(result)
    unasked = targets.verdicts(targets.CPU, {"questions": {}})
    assert {row["measured"] for row in unasked} == {row["met"] for row in unasked} == {None}


def test_pictures_carry_the_numbers_they_show(result, tmp_path):
    written = figures.draw(result, tmp_path)
    assert {path.stem for path in written} == {f"bench-{name}" for name in figures.FIGURES}
    for path in written:
        found = figures.numbers(result, path.stem.removeprefix("bench-"))
        assert figures.digest(found) in path.read_text()
    before = (tmp_path / "bench-error.svg").read_bytes()
    alone = {"questions": {"error": result["questions"]["error"]}}
    (written,) = figures.draw(alone, tmp_path)
    assert written.read_bytes() == before


def test_every_table_can_be_filled(result):
    document = "".join(f"<!-- bench: {name} -->\nold\n<!-- /bench -->\n" for name in BLOCKS)
    filled = report.filled(document, result)
    assert "old" not in filled
    assert report.filled(filled, result) == filled
    assert report.blocks_in(filled) == BLOCKS
    assert "](docs/bench-tokens.svg)" in filled
    for line in filled.splitlines():
        assert line.count("|") != 1


def test_the_headline_shows_losses(result):
    table = report.headline_table(result)
    for kind in figures.KINDS:
        times = targets.ratio(result, "base", kind, providers.COMPILED.name)
        assert (f"**{report._number(times)} ×**" in table) == (times < 1)


def test_documents_ask_for_tables_that_exist():
    for path in report.DOCUMENTS:
        text = path.read_text()
        assert set(report.blocks_in(text)) <= set(BLOCKS)
        assert len(report.blocks_in(text)) == text.count("<!-- bench:") == text.count("<!-- /bench")


def test_published_tables_and_pictures_match_the_result(result):
    assert {*schema.layers(result["speed"])} == {*CASES}
    assert {*schema.ops(result["speed"])} == {*OPS}
    for path, docs in report.DOCUMENTS.items():
        text = path.read_text()
        assert report.blocks_in(text), f"{path} shows no table"
        assert report.filled(text, result, docs) == text
    for name in figures.FIGURES:
        picture = (ROOT / f"docs/bench-{name}.svg").read_text()
        assert figures.digest(figures.numbers(result, name)) in picture


# --- the command --------------------------------------------------------------------------------


def test_command(tmp_path):
    arguments = ["state", "--threads", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"questions.json", "bench-state.svg"}
    again = load(tmp_path)
    assert again["questions"].keys() == {"state"}
    save(again, tmp_path)
    assert load(tmp_path) == again
    for wrong in (
        ["nothing"],
        ["state", "--publish", "--out", str(tmp_path)],
        ["--publish", "--result", str(tmp_path), "--out", str(tmp_path)],
    ):
        done = CliRunner().invoke(app, wrong, env={"COLUMNS": "200"})
        assert done.exit_code == 2
        assert "no question" in done.stderr or "needs every question" in done.stderr


def test_a_quick_run_leaves_no_numbers(tmp_path):
    done = CliRunner().invoke(app, ["state", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert not [*tmp_path.iterdir()]


def test_command_says_where_the_benchmark_is(monkeypatch, tmp_path):
    command = [sys.executable, "-m", "mal_kernels", "bench", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=HERE)
    assert done.returncode == 0, done.stderr
    assert "--publish" in done.stdout
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "mal_kernels/cli.py"))
    done = CliRunner().invoke(cli.app, ["bench"])
    assert done.exit_code == 1
    assert "clone the repository" in done.stderr
