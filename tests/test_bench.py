"""The benchmark itself: it refuses to time what does not agree."""

from __future__ import annotations

import pytest

from bench import run
from bench.cases import Case

TINY = Case("tiny", heads=2, tokens=8, head_dim=4, hidden_dim=8, chunk_size=4)


def test_every_provider_is_measured():
    result = run.measure_case(TINY, rounds=2)
    names = [provider.name for provider in run.PROVIDERS]
    assert list(result["forward_ms"]) == list(result["forward_backward_ms"]) == names
    assert all(row["p20"] <= row["median"] <= row["p80"] for row in result["forward_ms"].values())


def test_disagreement_stops_it(monkeypatch):
    wrong = run.Workload(run.OURS, TINY)
    monkeypatch.setattr(wrong, "op", lambda q, *rest: run.OURS.build(TINY)(1.001 * q, *rest))
    with pytest.raises(AssertionError, match="no agreement"):
        run.agreement(wrong, run.Workload(run.THEIRS, TINY))


def test_work_grows_with_the_case():
    # by hand, D=64, E=128, C=64, per chunk and head: 11·C·D·E + 2·C²·(D+E) multiply-adds
    assert Case("one", heads=1, tokens=64).flops("token") == 2 * (5_767_168 + 1_572_864)
    assert Case("two").flops("chunk") == 2 * Case("one", tokens=256).flops("chunk")
