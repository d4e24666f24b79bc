"""The instructions that GPU kernels execute for a tile of tokens: ``python -m bench.ptx``.

The PTX machine runs each kernel at two lengths, and the difference is divided by the tiles between
them: 64 tokens of one head. A warp scheduler issues at most one instruction a cycle and an SM has
four; its tensor cores do 4096 floating-point operations a cycle (bf16, Hopper). Neither floor can
be beaten, and the machine code has some 10 to 20 % more instructions than the PTX.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from bench.machine import ROOT
from mal_kernels import MemoryState, ops
from mal_kernels.testing import make_inputs
from mal_kernels.testing.ptx import cuda, triton
from mal_kernels.testing.ptx.machine import Outcome

RESULT, PAGE = ROOT / "bench/results/ptx.json", ROOT / "docs/kernels.md"
TILE, SHORT, LONG = 64, 512, 768  # tokens
D, E = 64, 256
ISSUED, TENSOR_FLOPS = 4, 4096  # of an SM in a cycle
ALLOWED = 1.02  # of a committed count
COUNTS = (
    *("warp_instructions", "tensor_instructions", "shared_loads", "shared_stores"),
    *("barriers", "cluster_barriers"),
)
Row = dict[str, float]
Rows = dict[str, Row]  # by target, op and kernel
console = Console()


def layer(tokens: int, backend: str) -> None:
    """Chunks of a tile, token steps: forward and backward."""
    inputs = make_inputs(
        dtype=torch.bfloat16, batch=1, heads=1, tokens=tokens, chunk_size=TILE, head_dim=D, hidden=E
    ).map(lambda x: x.requires_grad_())
    given: Any = inputs[:7]
    out = ops.neural_memory(*given, **inputs.options, backend=backend)
    (out.output.float().sum() + sum(w.sum() for w in out.state.weights)).backward()


def read(tokens: int, backend: str) -> None:
    """All tokens of one memory: forward and backward."""
    weights = tuple(torch.zeros(1, 1, a, b, requires_grad=True) for a, b in ((D, E), (E, D)))
    q = torch.zeros(1, tokens, 1, D, dtype=torch.bfloat16, requires_grad=True)
    ops.memory_read(q, MemoryState.from_weights(weights), backend=backend).float().sum().backward()


def scan(tokens: int, backend: str) -> None:
    """The bare scan of 64 features: forward and backward."""
    update = torch.zeros(1, tokens, 1, D, requires_grad=True)
    gate = torch.rand(1, tokens, 1, requires_grad=True)
    out = ops.momentum_scan(update, gate, gate, backend=backend)
    (out.weights.sum() + out.momentum.sum()).backward()


CALLS: dict[str, Callable[[int, str], None]] = {
    "neural_memory": layer,
    "memory_read": read,
    "momentum_scan": scan,
}
TARGETS: dict[str, tuple[str, Callable[[], AbstractContextManager[list[Outcome]]]]] = {
    "triton sm_90": ("triton", lambda: triton.executing("sm_90", checks=False)),
    "triton sm_80": ("triton", lambda: triton.executing("sm_80", checks=False)),
    "cuda sm_90a": ("cuda", lambda: cuda.executing(checks=False)),
}


def cases() -> list[tuple[str, str]]:
    """Targets and ops that are counted."""
    return [
        (target, op)
        for target, (backend, _) in TARGETS.items()
        for op in CALLS
        if (backend, op) != ("cuda", "memory_read")  # there is no such kernel
    ]


def measure(target: str, op: str) -> Rows:
    """Counts of every kernel of an op, for a tile and a head."""
    backend, executing = TARGETS[target]
    found = []
    for tokens in (SHORT, LONG):
        with executing() as outcomes:
            CALLS[op](tokens, backend)
        found.append(by_kernel(outcomes))
    short, long = found
    tiles = (LONG - SHORT) / TILE
    rows = {}
    for kernel, counts in long.items():
        row = {n: round((x - short[kernel][n]) / tiles, 1) for n, x in counts.items()}
        flops, sms = row.pop("tensor_flops"), counts["sms"]
        del row["sms"]
        row["issue_floor"] = round(row["warp_instructions"] / ISSUED / sms)
        row["tensor_floor"] = round(flops / TENSOR_FLOPS / sms)
        rows[f"{target}, {op}: {kernel}"] = row
    return rows


def by_kernel(outcomes: Iterable[Outcome]) -> dict[str, Row]:
    """Sums over launches of a kernel; one that runs again for the backward has a row of its own."""
    rows: dict[str, Row] = defaultdict(lambda: dict.fromkeys((*COUNTS, "tensor_flops", "sms"), 0))
    last = ""
    for outcome in outcomes:
        name = kernel_name(outcome.kernel)
        if name in rows and name != last and name == "neural_memory_fwd":
            name += ", the write again"
        last = name
        counts, row = outcome.counts, rows[name]
        warps = outcome.geometry.block[0] / 32
        row["warp_instructions"] += counts["steps"]
        row["tensor_instructions"] += counts.get("MMA", 0) + counts.get("WGMMA", 0)
        row["barriers"] += counts.get("BAR", 0) / warps
        row["cluster_barriers"] += counts.get("CLUSTER_WAIT", 0) / warps
        for same in ("shared_loads", "shared_stores", "tensor_flops"):
            row[same] += counts.get(same, 0)
        row["sms"] = outcome.geometry.cluster  # that share a head
    return dict(rows)


def kernel_name(name: str) -> str:
    """``write_bwd`` for nvcc's name of one of its types; Triton's are plain."""
    found = re.search(r"\d+([a-z][a-z_]*)I(?:f|6__half|13__nv_bfloat16)", name)
    return found[1] if found else name


def raised(found: Rows, committed: Rows) -> list[str]:
    """Counts that are more than 2 % above the committed ones, and kernels without one."""
    lines = []
    for kernel, row in found.items():
        if kernel not in committed:
            lines.append(f"{kernel}: not counted yet")
            continue
        for name in COUNTS:
            before = committed[kernel][name]
            if row[name] > ALLOWED * before:
                lines.append(f"{kernel}: {name} {before:g} → {row[name]:g}")
    return lines


def table(rows: Rows) -> str:
    """The rows in Markdown."""
    names = ("kernel", "warp instr.", "tensor", "ld.shared", "st.shared", "barriers", "cluster",
             "issue floor", "tensor floor")  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for kernel, row in rows.items():
        values = [f"{row[n]:,.0f}" for n in (*COUNTS, "issue_floor", "tensor_floor")]
        lines.append(f"| {kernel} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def with_table(page: str, rows: Rows) -> str:
    """The page with the table between its marks."""
    marks = r"(<!-- bench: ptx -->\n).*?(\n<!-- /bench -->)"
    return re.sub(marks, lambda m: m[1] + table(rows) + m[2], page, flags=re.DOTALL)


def main(
    publish: Annotated[
        bool, typer.Option("--publish", help="Into bench/results/ptx.json and docs/kernels.md.")
    ] = False,
) -> None:
    """Count what every GPU kernel executes for 64 tokens of a head; needs g++, Triton and nvcc."""
    rows: Rows = {}
    for target, op in cases():
        with console.status(f"{target}, {op}"):
            rows |= measure(target, op)
    console.print(Markdown(table(rows)))
    if publish:
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(with_table(PAGE.read_text(), rows))


if __name__ == "__main__":
    typer.run(main)
