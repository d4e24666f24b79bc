"""pytest-benchmark's JSON, read into cases, and written where pytest-benchmark does not run.

``pytest-benchmark compare`` reads every result. Times are seconds there, and milliseconds in
:data:`Quantiles`.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench import Result
from bench.interleaved import Quantiles

# what a quantile does not tell, and pytest-benchmark asks for
FIELDS = ("min", "max", "mean", "stddev", "iqr", "q1", "q3", "ops", "total")


def row(test: str, params: dict[str, str], ms: Quantiles, **extra: object) -> Result:
    """A row of the JSON of which only quantiles are known; the other statistics are NaN."""
    median, calls = ms["median"] / 1e3, int(ms["calls"])
    known = {"median": median, "rounds": calls, "iterations": 1, "outliers": "?"}
    name = "-".join(params.values()).encode("unicode_escape").decode()  # as pytest does
    return {
        "group": ", ".join(v for k, v in params.items() if k != "provider"),
        "name": f"{test.split('::')[-1]}[{name}]",
        "fullname": f"{test}[{name}]",
        "params": params,
        "param": name,
        "extra_info": extra | {"p20": ms["p20"] / 1e3, "p80": ms["p80"] / 1e3},
        "stats": dict.fromkeys(FIELDS, float("nan")) | known,
    }


def write(path: Path, result: Result) -> None:
    """JSON with a line for each benchmark."""
    head = json.dumps({**result, "benchmarks": []}, indent=1, ensure_ascii=False)
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result["benchmarks"])
    path.write_text(head.replace('"benchmarks": []', f'"benchmarks": [\n{rows}\n]') + "\n")


def quantiles(row: Result) -> Quantiles:
    """Milliseconds of a row."""
    seconds = {"median": row["stats"]["median"], **row["extra_info"]}
    return {name: 1e3 * seconds[name] for name in ("p20", "median", "p80")}


def layers(speed: Result) -> dict[str, dict[str, dict[str, Quantiles]]]:
    """Milliseconds of ``test_layer`` by case, kind and provider."""
    found: dict[str, dict[str, dict[str, Quantiles]]] = {}
    for entry in speed["benchmarks"]:
        if "provider" in (params := entry["params"]):
            kinds = found.setdefault(params["case"], {})
            kinds.setdefault(params["kind"], {})[params["provider"]] = quantiles(entry)
    return found


def ops(speed: Result) -> dict[str, Result]:
    """The rows of ``test_op`` by name of the case."""
    rows = (row for row in speed["benchmarks"] if "test_op[" in row["name"])
    return {row["params"]["case"]: row for row in rows}
