"""The benchmark itself: it refuses to time what does not agree, and publishes what it measured."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import figures, interleaved, providers, questions, report
from bench.cases import HOSTS, Case, turn_ops
from bench.questions import Bench
from bench.questions import conversation as turns
from bench.questions import overhead as hosts
from mal_kernels import cli

ROOT = Path(__file__).parents[2]
TINY = Case("tiny", heads=2, tokens=8, head_dim=4, hidden_dim=8, chunk_size=4)
RATES = {"float32_gflop_per_s": 10.0, "bfloat16_gflop_per_s": 10.0, "copy_gb_per_s": 5.0}
NAMES = [*report.BLOCKS, *(f"picture_{name}" for name in figures.FIGURES)]
QUICK = Bench(quick=True, threads=1, rates=RATES)
# compiling takes longer than all tests here
LISTED = [p for p in providers.PROVIDERS if p is not providers.COMPILED]


@pytest.fixture(scope="module")
def row():
    return questions.measure_case(TINY, LISTED, QUICK)


def test_every_provider_agrees_and_is_measured(row):
    names = [provider.name for provider in LISTED]
    assert list(row["forward_ms"]) == list(row["forward_backward_ms"]) == names
    assert not row["not_timed"]
    assert all(q["p20"] <= q["median"] <= q["p80"] for q in row["forward_ms"].values())


def test_what_disagrees_is_named_and_not_timed():
    right = providers.OURS.build
    wrong = replace(
        providers.EAGER, build=lambda case: lambda q, *rest: right(case)(1.001 * q, *rest)
    )
    row = questions.measure_case(TINY, [providers.OURS, wrong], QUICK)
    assert list(row["forward_ms"]) == [providers.OURS.name]
    assert row["not_timed"][wrong.name].startswith("disagrees: outputs differ by")


def test_the_compiled_chunk_is_the_eager_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    works = [providers.Workload(p, TINY) for p in (providers.OURS, providers.COMPILED)]
    assert providers.agreement(*works)["forward"] < 1e-5


def test_work_grows_with_the_case():
    # by hand, D=64, E=128, C=64, per chunk and head: 11·C·D·E + 2·C²·(D+E) multiply-adds
    assert Case("one", heads=1, tokens=64).flops("token") == 2 * (5_767_168 + 1_572_864)
    assert Case("two").flops("chunk") == 2 * Case("one", tokens=256).flops("chunk")
    # a part of a chunk has the products of its own tokens
    assert Case("part", heads=1, tokens=1).flops("token") == 2 * (11 * 64 * 128 + 2 * 192)
    read, write = turn_ops(HOSTS[-1], 1)
    assert read.flops == 2 * 112 * (3 * 4096 * 256 + 2 * 4 * 64 * 128)
    assert write.flops == 2 * 112 * 4 * 5 * 64 * 128
    assert write.bound_ms(RATES) == pytest.approx(1e3 * max(write.flops / 1e10, write.bytes / 5e9))


def test_slow_functions_are_called_less(monkeypatch):
    cost = {"fast": 1.0, "slow": 900.0}
    calls = []

    def once(function):
        calls.append(function())
        return cost[calls[-1]]

    found = interleaved.in_turns(
        {name: lambda name=name: name for name in cost}, seconds=0.1, rounds=5, most=7, once=once
    )
    assert found["fast"] == {"p20": 1.0, "median": 1.0, "p80": 1.0, "calls": 35}
    assert found["slow"]["calls"] == 3
    assert calls[:11] == ["fast", "slow", *["fast"] * 7, "slow", "fast"]


def test_pairs_see_a_difference_that_noise_hides(monkeypatch):
    noise = iter(x for n in range(100) for x in (n * 7 % 13, n * 7 % 13))
    monkeypatch.setattr(interleaved, "wall_clock_ms", lambda f: f() + 100 * next(noise))
    found = interleaved.in_pairs(lambda: 10.0, lambda: 11.0, rounds=10)
    assert found["added"]["median"] == pytest.approx(1.0)


def test_formulas_extend_what_was_measured():
    def at(turns_, ms):
        return {"turns": turns_, "ms": {"median": ms}}

    per_turn = turns.TURN_TOKENS
    lengths = {n: (n + 1) * per_turn for n in (3, 10, 30, 1000)}
    cost = {n: 0.01 * x + 1e-6 * x * x for n, x in lengths.items()}
    measured = [at(n, cost[n]) for n in (3, 10, 30)]
    (row,) = turns._by_formula(measured, "concatenation", (3, 10, 30, 1000))
    assert row["ms_by_formula"] == pytest.approx(cost[1000])
    assert row["bytes"] == turns.cache_bytes(lengths[1000])
    # noise must not make a longer context cheaper
    falling = [at(3, 20.0), at(10, 10.0)]
    (row,) = turns._by_formula(falling, "cache", (3, 10, 1000))
    assert row["ms_by_formula"] >= 10.0


def test_every_narrow_host_hears_its_clip(monkeypatch):
    monkeypatch.setitem(hosts.TOWER, "encoder_layers", 1)
    small = {"num_hidden_layers": 1}
    for name in hosts.NARROW:
        host = hosts.narrow_host(name, **small)
        prompt = hosts.narrow_inputs(name, seed=0)
        mal = hosts.MALAdapter().attach(host)
        with torch.no_grad(), hosts._tower_ms(host) as tower, mal.dialogue("x") as dialogue:
            host(**prompt, logits_to_keep=1)
        assert mal.last_turn.tokens == [hosts.TURN]
        assert dialogue.turns == [1]
        assert len(tower) == 1


@pytest.fixture(scope="module")
def result(row):
    """As it comes out of a whole run, from numbers that are made up."""
    ms = {"p20": 0.9, "median": 1.0, "p80": 1.1}
    peers = {name: copy.deepcopy(row) for name in ("base", "decode")}
    for case in peers.values():
        for kind in ("forward_ms", "forward_backward_ms"):
            case[kind] = {p.name: ms for p in LISTED} | {
                providers.THEIRS.name: {"p20": 70.0, "median": 80.0, "p80": 90.0}
            }
    points = [
        row | {"case": row["case"] | {"tokens": t, "name": f"T={t}"}} for t in (256, 512, 1024)
    ]
    overhead = {
        "prefill": {"base": ms, "other": ms, "added": ms},
        "tower": ms,
        "decode": {"base": ms, "other": ms, "added": ms},
        "share_of_prefill": 0.5,
        "share_of_decode": 0.001,
    }
    turn = {"turns": 0, "tokens": 132, "ms": ms, "bytes": 100}
    later = {"turns": 1000, "tokens": 132, "bytes": 100}
    ways = {way: [turn, later | {"ms_by_formula": 9.0}] for way in ("concatenation", "cache")}
    peaks = {"peak_bytes": {"256": 1e9, "512": 2e9}, "bytes_per_token": 4e6}
    op = {"op": "memory_read", "where": "x", "flops": 1e6, "bytes": 1e6, "ms": ms, "share": 0.5}
    found = {
        "quick": False,
        "rates": RATES,
        "machine": interleaved.describe_machine(1),
        "questions": {
            "peers": {"cases": peers, "not_run": {"a": "b"}},
            "tokens": {"points": points},
            "heads": {"points": points},
            "sizes": {"features": points, "width": points},
            "ops": {"rows": [op]},
            "memory": {providers.OURS.name: peaks},
            "conversation": ways | {"memory": [turn, later | {"ms": ms}]},
            "overhead": {"Qwen2-Audio": overhead},
            "error": questions.error(QUICK),
            "state": questions.state(QUICK),
        },
    }
    return json.loads(json.dumps(found | {"targets": report.targets(found)}))


def test_targets_are_met_or_missed_by_their_numbers(result):
    found = {row["target"]: row for row in result["targets"]}
    assert found["forward, times titans-pytorch (T=512)"]["measured"] == pytest.approx(80.0)
    assert found["forward, times titans-pytorch (T=512)"]["met"] is True
    assert found["forward, times its chunk-gate mode"]["met"] is False
    assert found["% added to the prefill of a narrow Qwen2-Audio"]["met"] is False
    assert found["% added to its decode"]["met"] is True
    table = report.targets_table(result)
    assert "| ≤ 5 | 50.00 | **missed** |" in table
    assert all(row["met"] is None for row in report.targets(result | {"quick": True}))
    unasked = report.targets({"quick": False, "questions": {}})
    assert {row["measured"] for row in unasked} == {None}


def test_comparison_tells_a_change_from_noise(result):
    slower = copy.deepcopy(result)
    name = providers.OURS.name
    ms = slower["questions"]["peers"]["cases"]["base"]["forward_ms"]
    ms[name] = {"p20": 1.9, "median": 2.0, "p80": 2.1}
    ms[providers.EAGER.name] = {"p20": 0.95, "median": 1.06, "p80": 1.15}
    key = "peers cases base forward_ms"
    worse = {row[0]: row[3] for row in report.compare(slower, result)}
    assert worse.pop(f"{key} {name}") == "worse"
    assert set(worse.values()) == {"noise"}
    better = {row[0]: row[3] for row in report.compare(result, slower)}
    assert better[f"{key} {name}"] == "better"
    assert not any("added" in row for row in worse)
    text = report.comparison(slower | {"machine": {"threads": 9}}, result)
    assert "0 better, 1 worse" in text
    assert "**threads differs:** 1 before, 9 now" in text
    assert f"| {key} {name} | 1.00 | 2.00 | +100 % | worse |" in text


def test_pictures_carry_the_numbers_they_show(result, tmp_path):
    written = figures.draw(result, tmp_path)
    assert {path.stem for path in written} == {f"bench-{name}" for name in figures.FIGURES}
    for path in written:
        found = result["questions"][path.stem.removeprefix("bench-")]
        assert figures.digest(found) in path.read_text()
    before = (tmp_path / "bench-error.svg").read_bytes()
    error = {"error": result["questions"]["error"]}
    figures.draw(result | {"questions": error}, tmp_path)
    assert (tmp_path / "bench-error.svg").read_bytes() == before


def test_every_table_can_be_filled(result):
    document = "".join(f"<!-- bench: {name} -->\nold\n<!-- /bench -->\n" for name in NAMES)
    filled = report.filled(document, result)
    assert "old" not in filled
    assert report.filled(filled, result) == filled
    assert report.blocks_in(filled) == NAMES
    assert "](docs/bench-tokens.svg)" in filled
    for line in filled.splitlines():
        assert line.count("|") != 1


def test_documents_ask_for_tables_that_exist():
    for path in report.DOCUMENTS:
        text = path.read_text()
        assert set(report.blocks_in(text)) <= set(NAMES)
        assert len(report.blocks_in(text)) == text.count("<!-- bench:") == text.count("<!-- /bench")


def test_published_tables_and_pictures_match_the_result():
    published = json.loads((ROOT / "bench/results/cpu-2-threads.json").read_text())
    assert published["targets"] == report.targets(published)
    for path, docs in report.DOCUMENTS.items():
        text = path.read_text()
        assert report.blocks_in(text), f"{path} shows no table"
        assert report.filled(text, published, docs) == text
    for name in figures.FIGURES:
        picture = (ROOT / f"docs/bench-{name}.svg").read_text()
        assert figures.digest(published["questions"][name]) in picture


def test_command(tmp_path):
    from bench.__main__ import app

    arguments = ["state", "--quick", "--threads", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"cpu-1-threads.json", "bench-state.svg"}
    path = str(tmp_path / "cpu-1-threads.json")
    again = ["state", "--result", path, "--base", path, "--out", str(tmp_path)]
    done = CliRunner().invoke(app, again, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    for wrong in (["nothing"], ["state", "--publish"], ["--publish", "--result", path]):
        done = CliRunner().invoke(app, wrong, env={"COLUMNS": "200"})
        assert done.exit_code == 2
        assert re.search("no question|needs every question|cannot be published", done.stderr)


def test_command_says_where_the_benchmark_is(monkeypatch, tmp_path):
    done = CliRunner().invoke(cli.app, ["bench", "--help"])
    assert done.exit_code == 0
    assert "--publish" in done.output
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "mal_kernels/cli.py"))
    done = CliRunner().invoke(cli.app, ["bench"])
    assert done.exit_code == 1
    assert "clone the repository" in done.stderr
