"""A result as tables in Markdown, in the terminal and in the documents of the repository."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench import Result, schema
from bench.cases import DECODE, OPS, PEERS, OpCase
from bench.figures import FIGURES
from bench.interleaved import Quantiles
from bench.machine import ROOT
from bench.providers import COMPILED, EAGER, OURS, PROVIDERS, THEIRS
from bench.targets import CPU, ratio, verdicts

DOCUMENTS = {ROOT / "README.md": "docs", ROOT / "bench/README.md": "../docs"}  # to its pictures


def _table(*rows: list[str]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *body))


def _ms(value: Quantiles) -> str:
    """``median (p20–p80)``."""
    return f"{_number(value['median'])} ({_number(value['p20'])}–{_number(value['p80'])})"


def _number(x: float) -> str:
    """Three digits, no exponent."""
    return f"{x:.0f}" if abs(x) >= 99.5 else f"{x:.1f}" if abs(x) >= 9.95 else f"{x:.2f}"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{_number(n)} {unit}"
        n /= 1000
    return f"{_number(n)} GB"


def targets_table(result: Result) -> str:
    """Target, goal, number, met or missed."""
    rows = [["target", "goal", "measured", ""]]
    for row in verdicts(CPU, result):
        found = "not measured" if row["measured"] is None else f"{row['measured']:.2f}"
        word = {None: "", True: "met", False: "**missed**"}[row["met"]]
        rows.append([row["target"], row["goal"], found, word])
    return _table(*rows)


def headline_table(result: Result) -> str:
    """The headline answers what a newcomer asks first, losses included."""
    rows = [["on two CPU cores, float32", "forward", "forward and backward"]]
    for other in (THEIRS, EAGER, COMPILED):
        times = [
            ratio(result, "base", kind, other.name) for kind in ("forward", "forward_backward")
        ]
        cells = [f"{_number(x)} × as fast" if x >= 1 else f"**{_number(x)} ×**" for x in times]
        rows.append([f"a layer of 512 tokens, beside {other.library}", *cells])
    added = result["questions"]["overhead"]
    for name, row in added.items():
        shares = [f"{100 * row[f'share_of_{kind}']:+.1f} %" for kind in ("prefill", "decode")]
        rows.append([f"added to a narrow {name}: prefill, then each token", *shares])
    return _table(*rows)


def peers_table(result: Result) -> str:
    """Every case and provider with quantiles, and shares of the matrix-product rate."""
    best = result["speed"]["machine_info"]["rates"]["float32_gflop_per_s"]
    rows = [["case", "provider", "forward ms", "forward and backward ms", "of matmul rate"]]
    for case in (*PEERS, DECODE):
        found = schema.layers(result["speed"])[case.name]
        for name, forward in found["forward"].items():
            rate = case.flops(PROVIDERS[name].step) / forward["median"] / 1e6
            both = _ms(found["forward_backward"][name])
            rows.append([case.name, name, _ms(forward), both, f"{100 * rate / best:.1f} %"])
    return _table(*rows)


def ops_table(result: Result) -> str:
    """Every op at real sizes, and how near it is to what the machine can do."""
    rates = result["speed"]["machine_info"]["rates"]
    rows = [["op", "where", "MFLOP", "MB", "ms", "of the bound"]]
    for name, row in schema.ops(result["speed"]).items():
        case, ms = OPS[name], schema.quantiles(row)
        work = [_number(case.flops / 1e6), _number(case.bytes / 1e6)]
        share = f"{100 * bound_ms(case, rates) / ms['median']:.0f} %"
        rows.append([f"`{case.op}`", case.where, *work, _ms(ms), share])
    return _table(*rows)


def bound_ms(case: OpCase, rates: dict[str, float]) -> float:
    """The time that the device needs for the arithmetic or for the traffic, the longer one."""
    arithmetic = case.flops / rates["float32_gflop_per_s"]
    return max(arithmetic, case.bytes / rates["copy_gb_per_s"]) / 1e6


def memory_table(result: Result) -> str:
    """Bytes per token of forward and backward."""
    found = result["questions"]["memory"]
    mine = found[OURS.name]["bytes_per_token"]
    rows = [["forward and backward", "peak memory per token", "×"]]
    for name, row in found.items():
        slope = row["bytes_per_token"]
        rows.append([name, _bytes(slope), _number(slope / mine)])
    return _table(*rows)


def conversation_table(result: Result) -> str:
    """Cost of a turn by the number of earlier turns."""
    titles = {"memory": "memory", "cache": "key-value cache", "concatenation": "concatenation"}
    head = [f"{title}: {what}" for title in titles.values() for what in ("ms", "bytes")]
    rows = [["earlier turns", *head]]
    found = result["questions"]["conversation"]
    by_turns = {way: {x["turns"]: x for x in found[way]} for way in titles}
    for turns in by_turns["memory"]:
        at = [by_turns[way].get(turns) for way in titles]
        cells = [(_number(x["ms"]["median"]), _bytes(x["bytes"])) if x else ("–", "–") for x in at]
        rows.append([f"{turns:,}", *(text for cell in cells for text in cell)])
    return _table(*rows)


def overhead_table(result: Result) -> str:
    """The table shows what the memory adds to narrow hosts."""
    rows = [["narrow host", "call ms", "its tower", "memory adds ms", "of prefill", "of decode"]]
    for name, row in result["questions"]["overhead"].items():
        first = row["prefill"]
        shares = [f"{100 * row[k]:.1f} %" for k in ("share_of_prefill", "share_of_decode")]
        tower = _number(row["tower"]["median"])
        rows.append([name, _ms(first["base"]), tower, _ms(first["added"]), *shares])
    return _table(*rows)


def thread_table(result: Result) -> str:
    """CPU time of one thread on the base case."""
    rows = [["one thread, CPU time", "forward ms", "forward and backward ms"]]
    for name, row in result["questions"].get("thread", {}).get("base", {}).items():
        rows.append([name, _ms(row["forward"]), _ms(row["forward_backward"])])
    return _table(*rows)


def machine_line(result: Result) -> str:
    """Where, with what and when."""
    m = result["speed"]["machine_info"] if "speed" in result else result["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v)
    changed = " with uncommitted changes" if m["uncommitted_changes"] else ""
    line = f"{m['cpu']}, {m['threads']} threads, {m['date']}, commit {str(m['commit'])[:10]}"
    line += f"{changed}; {versions}."
    if rates := m.get("rates"):
        line += (
            f" In the same run it did {rates['float32_gflop_per_s']:.0f} GFLOP/s of float32 matrix "
            f"products, {rates['bfloat16_gflop_per_s']:.0f} of bfloat16, and copied "
            f"{rates['copy_gb_per_s']:.0f} GB/s."
        )
    return line + (f" {m['note']}" if "note" in m else "")


BLOCKS: dict[str, Callable[[Result], str]] = {
    f.__name__.rsplit("_", 1)[0]: f
    for f in (
        *(machine_line, targets_table, headline_table, peers_table, ops_table),
        *(memory_table, conversation_table, overhead_table, thread_table),
    )
}
_MARKED = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- /bench -->)", re.S)


def filled(document: str, result: Result, docs: str = "docs") -> str:
    """``document`` with every ``<!-- bench: NAME -->`` … ``<!-- /bench -->`` block made anew.

    ``NAME`` is a table of :data:`BLOCKS` or ``picture_QUESTION``; pictures are in ``docs``.
    """

    def block(found: re.Match[str]) -> str:
        name = found[2].removeprefix("picture_")
        if name == found[2]:
            return f"{found[1]}{BLOCKS[name](result)}\n{found[3]}"
        about = str(FIGURES[name].__doc__).splitlines()[0].removesuffix(".")
        return f"{found[1]}![{about}]({docs}/bench-{name}.svg)\n{found[3]}"

    return _MARKED.sub(block, document)


def blocks_in(document: str) -> list[str]:
    """Names of the blocks."""
    return [name for _, name, _ in _MARKED.findall(document)]


def publish(result: Result) -> list[Path]:
    """Writes the tables into the documents of the repository; returns those."""
    for path, docs in DOCUMENTS.items():
        path.write_text(filled(path.read_text(), result, docs))
    return list(DOCUMENTS)
