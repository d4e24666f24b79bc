"""What a result says: targets met or missed, tables in Markdown, and what changed since another."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.figures import FIGURES
from bench.interleaved import ROOT
from bench.providers import OURS, OURS_CHUNK, PROVIDERS, THEIRS, THEIRS_CHUNK

Result = dict[str, Any]
DOCUMENTS = {ROOT / "README.md": "docs", ROOT / "bench/README.md": "../docs"}  # to its pictures
NOISE = 0.05  # medians closer than this are one


# --- targets ------------------------------------------------------------------------------------


def ratio(row: Result, kind: str, other: str, mine: str = OURS.name) -> float:
    """How many times as long ``other`` takes."""
    ms = row[f"{kind}_ms"]
    return float(ms[other]["median"] / ms[mine]["median"])


def _peer(result: Result, kind: str, other: str, case: str = "base") -> float:
    return ratio(result["questions"]["peers"]["cases"][case], kind, other)


def _growth(result: Result, kind: str) -> float:
    """The ratio at the longest T that both were timed at, over that at a quarter of it."""
    points = result["questions"]["tokens"]["points"]
    both = {
        p["case"]["tokens"]: ratio(p, kind, THEIRS.name)
        for p in points
        if THEIRS.name in p[f"{kind}_ms"]
    }
    return both[max(both)] / both[max(both) // 4]


def _overhead(result: Result, share: str) -> float:
    return 100 * float(result["questions"]["overhead"]["Qwen2-Audio"][share])


# what is asked for: at least (≥) or at most (≤) this, and how it is read off a result
TARGETS: dict[str, tuple[str, float, Callable[[Result], float]]] = {
    "forward, times titans-pytorch (T=512)": (
        *("≥", 60),
        lambda r: _peer(r, "forward", THEIRS.name),
    ),
    "forward and backward, likewise": (
        *("≥", 25),
        lambda r: _peer(r, "forward_backward", THEIRS.name),
    ),
    "forward ratio, T=1024 over T=256": ("≥", 1, lambda r: _growth(r, "forward")),
    "forward and backward ratio, likewise": ("≥", 1, lambda r: _growth(r, "forward_backward")),
    "forward, times its chunk-gate mode": (
        *("≥", 2),
        lambda r: _peer(r, "forward", THEIRS_CHUNK.name),
    ),
    "decode of one token, times titans-pytorch": (
        *("≥", 20),
        lambda r: _peer(r, "forward", THEIRS.name, "decode"),
    ),
    "% added to the prefill of a narrow Qwen2-Audio": (
        *("≤", 5),
        lambda r: _overhead(r, "share_of_prefill"),
    ),
    "% added to its decode": ("≤", 1, lambda r: _overhead(r, "share_of_decode")),
}


def targets(result: Result) -> list[Result]:
    """Every target with what was measured (None: it was not) and whether that meets it."""
    rows = []
    for name, (sign, goal, read) in TARGETS.items():
        try:
            found = None if result["quick"] else read(result)
        except KeyError:  # its question was not asked
            found = None
        met = None if found is None else found >= goal if sign == "≥" else found <= goal
        rows.append({"target": name, "goal": f"{sign} {goal}", "measured": found, "met": met})
    return rows


# --- tables in Markdown -------------------------------------------------------------------------


def _table(*rows: list[str]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *body))


def _ms(value: Result | None) -> str:
    """``median (p20–p80)``."""
    if value is None:
        return "–"
    return f"{_number(value['median'])} ({_number(value['p20'])}–{_number(value['p80'])})"


def _number(x: float) -> str:
    """Three digits, no exponent."""
    return f"{x:.0f}" if abs(x) >= 99.5 else f"{x:.1f}" if abs(x) >= 9.95 else f"{x:.2f}"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{_number(n)} {unit}"
        n /= 1000
    raise AssertionError


def targets_table(result: Result) -> str:
    """Target, goal, number, met or missed."""
    rows = [["target", "goal", "measured", ""]]
    for row in result["targets"]:
        found = "not measured" if row["measured"] is None else f"{row['measured']:.2f}"
        rows.append([row["target"], row["goal"], found, _word(row["met"])])
    return _table(*rows)


def _word(met: bool | None) -> str:
    return {None: "", True: "met", False: "**missed**"}[met]


def summary_table(result: Result) -> str:
    """The base case against what there is, with ratios."""
    row = result["questions"]["peers"]["cases"]["base"]
    rows = [["`B=1 H=4 T=512 D=64 E=128`, ms", "forward", "×", "forward and backward", "×"]]
    for mine in (OURS, OURS_CHUNK):
        for p in (p for p in PROVIDERS if p.step == mine.step and p.name in row["forward_ms"]):
            cells = [p.name]
            for kind in ("forward", "forward_backward"):
                median = row[f"{kind}_ms"][p.name]["median"]
                cells += [_number(median), _number(ratio(row, kind, p.name, mine.name))]
            rows.append(cells)
    return _table(*rows)


def peers_table(result: Result) -> str:
    """Every case and provider with quantiles, and shares of the matrix-product rate."""
    rates = result["rates"]
    rows = [["case", "provider", "forward ms", "forward and backward ms", "of matmul rate"]]
    for name, row in result["questions"]["peers"]["cases"].items():
        for p in (p for p in PROVIDERS if p.name in row["forward_ms"]):
            forward, both = (row[f"{k}_ms"][p.name] for k in ("forward", "forward_backward"))
            rate = 1e3 * row["forward_gflop"][p.step] / forward["median"]
            share = f"{100 * rate / rates['float32_gflop_per_s']:.1f} %"
            rows.append([name, p.name, _ms(forward), _ms(both), share])
    left_out = dict(result["questions"]["peers"]["not_run"])
    for name, row in result["questions"]["peers"]["cases"].items():
        left_out |= {f"{p} on {name}": why for p, why in row["not_timed"].items()}
    return _table(*rows) + "\n\nNot timed: " + "; ".join(f"{n}: {w}" for n, w in left_out.items())


def ops_table(result: Result) -> str:
    """Every op at real sizes, and how near it is to what the machine can do."""
    rows = [["op", "where", "MFLOP", "MB", "ms", "of the bound"]]
    for row in result["questions"]["ops"]["rows"]:
        work = [_number(row["flops"] / 1e6), _number(row["bytes"] / 1e6)]
        share = f"{100 * row['share']:.0f} %"
        rows.append([f"`{row['op']}`", row["where"], *work, _ms(row["ms"]), share])
    return _table(*rows)


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
    """Cost of a turn by the number of earlier turns; what was computed is in italics."""
    found = result["questions"]["conversation"]
    titles = {"memory": "memory", "cache": "key-value cache", "concatenation": "concatenation"}
    head = [f"{title}: {what}" for title in titles.values() for what in ("ms", "bytes")]
    rows = [["earlier turns", *head]]
    for turns in (x["turns"] for x in found["memory"]):
        cells = [f"{turns:,}"]
        for way in titles:
            (x,) = (x for x in found[way] if x["turns"] == turns)
            computed = x.get("ms_by_formula")
            ms = f"*{_number(computed)}*" if computed else _number(x["ms"]["median"])
            cells += [ms, _bytes(x["bytes"])]
        rows.append(cells)
    return _table(*rows)


def overhead_table(result: Result) -> str:
    """What the memory adds to narrow hosts."""
    rows = [["narrow host", "call ms", "its tower", "memory adds ms", "of prefill", "of decode"]]
    for name, row in result["questions"]["overhead"].items():
        first = row["prefill"]
        shares = [f"{100 * row[k]:.1f} %" for k in ("share_of_prefill", "share_of_decode")]
        tower = _number(row["tower"]["median"])
        rows.append([name, _ms(first["base"]), tower, _ms(first["added"]), *shares])
    return _table(*rows)


def machine_line(result: Result) -> str:
    """Where, with what and when."""
    m, rates = result["machine"], result["rates"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v)
    changed = " with uncommitted changes" if m["uncommitted_changes"] else ""
    commit = str(m["commit"])[:10] + changed
    return (
        f"{m['cpu']}, {m['threads']} threads, {m['date']}, commit {commit}; {versions}. In the "
        f"same run it did {rates['float32_gflop_per_s']:.0f} GFLOP/s of float32 matrix products, "
        f"{rates['bfloat16_gflop_per_s']:.0f} of bfloat16, and copied "
        f"{rates['copy_gb_per_s']:.0f} GB/s."
    )


BLOCKS: dict[str, Callable[[Result], str]] = {
    f.__name__.removesuffix("_table").removesuffix("_line"): f
    for f in (
        *(machine_line, targets_table, summary_table, peers_table, ops_table),
        *(memory_table, conversation_table, overhead_table),
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


# --- two results --------------------------------------------------------------------------------


def compare(new: Result, base: Result) -> list[tuple[str, float, float, str]]:
    """Every time in both: its name, milliseconds before and now, and better, worse or noise.

    Noise: the ranges from the 20 % to the 80 % quantile meet, or the medians are within 5 %.
    """
    before, rows = dict(_times(_measured(base))), []
    for name, now in _times(_measured(new)):
        if name in before:
            old = before[name]
            apart = now["p20"] > old["p80"] or now["p80"] < old["p20"]
            change = now["median"] / old["median"] - 1
            verdict = "noise"
            if apart and abs(change) > NOISE:
                verdict = "worse" if change > 0 else "better"
            rows.append((name, old["median"], now["median"], verdict))
    return rows


def _measured(result: Result) -> Any:
    """The part with the times, of a CPU run or of a GPU session."""
    return result["questions"] if "questions" in result else result["timings"]


def comparison(new: Result, base: Result) -> str:
    """What changed, in Markdown, and what else differs between the two runs."""
    rows = compare(new, base)
    counts = {v: sum(row[3] == v for row in rows) for v in ("better", "worse", "noise")}
    lines = [", ".join(f"{n} {verdict}" for verdict, n in counts.items())]
    now_at, was_at = (r.get("machine") or r.get("environment") or {} for r in (new, base))
    differing = [
        f for f in ("device", "cpu", "threads", "versions") if now_at.get(f) != was_at.get(f)
    ]
    lines += [f"**{f} differs:** {was_at.get(f)} before, {now_at.get(f)} now" for f in differing]
    table = [["measurement", "before ms", "now ms", "", ""]]
    for name, before, now, verdict in rows:
        if verdict != "noise":
            change = f"{100 * (now / before - 1):+.0f} %"
            table.append([name, _number(before), _number(now), change, verdict])
    return "\n\n".join(lines) + ("\n\n" + _table(*table) if len(table) > 1 else "")


def _times(node: Any, path: str = "") -> Iterator[tuple[str, Result]]:
    """Every dictionary of quantiles in a result, by its path; differences are no times."""
    if isinstance(node, dict):
        if {"p20", "median", "p80"} <= node.keys():
            if not path.endswith("added"):
                yield path, node
            return
        for name, child in node.items():
            yield from _times(child, f"{path} {name}".strip())
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from _times(child, f"{path} {_label(child, position)}")


def _label(child: Any, position: int) -> str:
    """What tells an entry of a list from the others."""
    if isinstance(child, dict):
        if "case" in child:
            return str(child["case"]["name"])
        if "op" in child:
            return f"{child['op']} {child['where']}"
        if "turns" in child:
            return f"after {child['turns']}"
    return str(position)


if __name__ == "__main__":
    # python -m bench.report NEW BASE: the comparison, for a pull request
    print(comparison(*(json.loads(Path(path).read_text()) for path in sys.argv[1:3])))
