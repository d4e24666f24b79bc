"""The report reads a GPU session: what ``auto`` may use, and tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from bench import Result, schema
from bench.targets import GPU, verdicts


def targets(result: Result) -> list[Result]:
    """Every target, met or missed; of a dry run, which measures nothing, none is measured."""
    found = {} if result["environment"]["dry_run"] else result
    return [
        {"backend": backend} | row
        for backend, asked in GPU.items()
        for row in verdicts(asked, found, backend)
    ]


def speeds(result: Result) -> Result:
    """The times as pytest-benchmark writes them, for ``pytest-benchmark compare``."""
    rows = [
        schema.row("bench/gpu/steps.py::step", {"case": case, "provider": who, "kind": kind}, ms)
        for case, found in result["timings"].items()
        for kind in ("forward", "forward_backward")
        for who, ms in found.get(f"{kind}_ms", {}).items()
    ]
    return {"machine_info": result["environment"], "commit_info": {}, "benchmarks": rows}


def measured(result: Result) -> list[Result]:
    """Entries of ``mal_kernels/ops/measured.json``: where a backend is right and faster throughout.

    Triton than the reference, CUDA than both. What has failed a sanitizer is not right, whenever
    that ran.
    """
    environment, entries = result["environment"], []
    failed = result.get("failed", ())
    for backend, rivals in (("triton", ["reference"]), ("cuda", ["reference", "triton"])):
        parity = result.get("parity", {}).get(backend, {})
        for row in result["timings"].values():
            kinds = [
                row[k] for k in ("forward_ms", "forward_backward_ms") if backend in row.get(k, ())
            ]
            passed = parity.get(row["op"], {"passed": 0})["passed"]
            right = passed and f"{backend} {row['op']}" not in failed
            if not right or not kinds or not all("reference" in ms for ms in kinds):
                continue
            least = [min(ms[r]["median"] for r in rivals if r in ms) for ms in kinds]
            mine = [ms[backend]["median"] for ms in kinds]
            if all(a < b for a, b in zip(mine, least, strict=True)):
                speedup = [ms["reference"]["median"] / m for ms, m in zip(kinds, mine, strict=True)]
                same = {name: row[name] for name in ("op", "dtype", "features", "tokens")}
                entries.append(
                    {"backend": backend}
                    | same
                    | {name: environment[name] for name in ("architecture", "device", "commit")}
                    | {"speedup": [round(x, 2) for x in speedup]}
                )
    return entries


def merged(first: Result, second: Result) -> Result:
    """One result of the two calls of a session."""
    both = first | second
    for name in ("steps", "timings", "parity"):
        both[name] = first.get(name, {}) | second.get(name, {})
    both["failed"] = sorted({*first.get("failed", ()), *second.get("failed", ())})
    both["targets"] = targets(both)
    return both


def main(first: Path, second: Path) -> None:
    """Merge the results of both calls, and show what ``auto`` may follow."""
    result = merged(*(json.loads(path.read_text()) for path in (first, second)))
    console = Console()
    show(console, result)
    console.print_json(json.dumps(measured(result)))
    path = first.with_name(first.name.replace("-call-1", ""))
    path.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"merged into {path}", soft_wrap=True)


def show(console: Console, result: Result) -> None:
    """Times and targets as tables."""
    table = Table("case", "provider", "forward", "forward+backward", "peak GiB", title="ms, median")
    for case, provider, cells in _cells(result):
        table.add_row(case, provider, *cells)
    console.print(table)
    for case, row in result["timings"].items():
        for provider, why in (row.get("unable", {}) | row.get("wrong", {})).items():
            console.print(f"{case}, {provider}: {why}", highlight=False)
    goals = Table("backend", "target (one H200)", "goal", "measured", "", title="Targets")
    for row in result["targets"]:
        found = "not measured" if row["measured"] is None else f"{row['measured']:.2f}"
        word = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}[row["met"]]
        goals.add_row(row["backend"], row["target"], row["goal"], found, word)
    console.print(goals)


def _cells(result: Result) -> Iterator[tuple[str, str, list[str]]]:
    for case, row in result["timings"].items():
        forward, both = row.get("forward_ms", {}), row.get("forward_backward_ms", {})
        for provider in forward:
            found = [kind.get(provider, {}).get("median") for kind in (forward, both)]
            ms = ["" if x is None else f"{x:.4g}" for x in found]
            peak = row.get("peak_bytes", {}).get(provider)
            yield case, provider, [*ms, f"{peak / 2**30:.1f}" if peak else ""]


if __name__ == "__main__":
    typer.run(main)
