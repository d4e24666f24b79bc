"""The first sentence of a docstring is one that a stranger understands: a subject and a verb."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("mal_kernels", "bench", "examples", "tools", "setup.py")
# they stand for a subject that only the line above knows
DANGLING = re.compile(
    r"(Of|As|Likewise|What|Those|Also|Whose|So|Such|Moreover|The same)\b|.*\b(likewise|as there)\b"
)


def python_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--", *FOLDERS]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in found.split("\0") if name.endswith(".py")]


def test_docstrings_begin_with_a_sentence():
    found = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").split("\n\n")[0]
                if DANGLING.match(first):
                    found.append(f"{path.relative_to(ROOT)}: {first}")
    assert not found
