"""Which way dependencies point, what an import costs, and what may stand in a file."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.process import run_python

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mal_kernels"

# A module imports only from layers below its own; two units of one layer do not know each other.
LAYERS = (
    ("errors",),
    ("state", "config"),
    ("call", "network"),
    ("_native",),
    ("reference", "_torch", "_cpu", "_triton", "_cuda"),
    ("ops",),
    ("memory", "dialogues", "hosts"),
    ("adapter", "store"),
    ("__init__",),
    ("testing", "integrations", "console"),
    ("demo", "train"),
    ("ser", "serve"),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {unit: depth for depth, layer in enumerate(LAYERS) for unit in layer}
# What a folder beside the package may import of this repository.
BESIDE = {
    "bench": {"mal_kernels", "bench"},
    "examples": {"mal_kernels", "examples"},
    "tools": {"mal_kernels", "tools"},
    "tests": {"mal_kernels", "bench", "examples", "tools", "tests"},
}
ROOTS = {"mal_kernels", *BESIDE}
# not even inside a function
NEVER_IN_CORE = {"transformers", "peft", "matplotlib", "rich", "typer", "soundfile", "soxr"}
CORE = {unit for layer in LAYERS[:7] for unit in layer} - {"hosts"}
LOOKS_LIKE_A_MODULE = re.compile(rf"^({'|'.join(sorted(ROOTS))})(\.\w+)+\.?$")


def unit_of(path: Path) -> str:
    """``mal_kernels/ops/scan.py`` belongs to ``ops``, ``mal_kernels/state.py`` to ``state``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import of a file, inside functions and strings too.

    A string that is the dotted name of a module is one that ``importlib`` or ``-m`` will import.
    """
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(here[: -node.level] if node.level else ()), node.module or ""])
            yield from ((node.lineno, f"{base.rstrip('.')}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and LOOKS_LIKE_A_MODULE.match(str(node.value)):
            yield node.lineno, str(node.value).rstrip(".")


def internal_unit(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "mal_kernels":
        return None
    # `from mal_kernels import X`: X is a module, or a public name of __init__
    return parts[1] if len(parts) > 1 and parts[1] in LAYER_OF else "__init__"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down(path):
    unit = unit_of(path)
    assert unit in LAYER_OF, f"{unit} has no layer: add it to LAYERS where it belongs"
    for line, module in imported_modules(path):
        where, target = f"{path.name}:{line}", internal_unit(module)
        if target is not None and target != unit:
            assert LAYER_OF[target] < LAYER_OF[unit], f"{where}: {unit} imports {module}"
            assert target != "reference" or unit == "testing", f"{where}: only testing judges"
        root = module.split(".")[0]
        assert root not in BESIDE, f"{where}: the package imports {module}"
        if unit in CORE:
            assert root not in NEVER_IN_CORE, f"{where}: {module}"


@pytest.mark.parametrize("folder", BESIDE)
def test_what_lies_beside_the_package_imports_what_it_may(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for line, module in imported_modules(path):
            root, *rest = module.split(".")
            where = f"{path.relative_to(ROOT)}:{line}"
            assert root not in ROOTS - BESIDE[folder], f"{where}: {folder} imports {module}"
            assert not root.startswith("test_"), f"{where}: what tests share is in tests/support"
            if root == "tests":
                # what two files share is in support; a run at length is the subject of its test
                assert rest[0] in {"support", "reliability", "ser", "gpu"}, f"{where}: {module}"


def test_import_loads_torch_only():
    heavy = ["transformers", "triton", "peft", "matplotlib", "typer", "rich", "soundfile", "redis"]
    code = "import json, sys, {}; print(json.dumps([m for m in {} if m in sys.modules]))"
    by_torch = json.loads(run_python(code.format("torch", heavy)))
    by_us = json.loads(run_python(code.format("mal_kernels", heavy)))
    assert by_us == by_torch


@pytest.mark.slow
def test_import_is_nearly_free():
    # processor time: a busy machine stretches the clock on the wall
    code = "import time, {}; print(time.process_time())"
    seconds = {
        name: min(float(run_python(code.format(name))) for _ in range(3))
        for name in ("torch", "mal_kernels")
    }
    assert seconds["mal_kernels"] < 1.5 * seconds["torch"]


def repository_files() -> list[Path]:
    """Files that are, or would be, committed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = [ROOT / name for name in listing.split("\0") if name]
    return [f for f in files if f.is_file() and f.suffix not in {".safetensors", ".png", ".wav"}]


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return {path: path.read_text(encoding="utf-8") for path in repository_files()}


def test_no_machine_paths_or_leftovers(texts):
    # [/] keeps this file from matching itself
    banned = re.compile(r"[/](work|farm|root|home)/\w|bash[_]jobs|[<]{7} |[T]ODO|[F]IXME|[X]XX")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if banned.search(line)
    ]
    assert not found


def test_links_in_documents_lead_somewhere(texts):
    for path, text in texts.items():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#\s]+)", text):
                if "://" not in target:
                    assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_uninitialised_memory_is_poisoned():
    x = torch.ones(2)
    for empty in (torch.empty(2), torch.empty_like(x), x.new_empty(2)):
        assert empty.isnan().all()
