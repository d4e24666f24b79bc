"""Every block of the README runs, or names things that exist, and the page stays a page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mal_kernels.testing import tiny_host, tiny_inputs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def test_is_a_page():
    assert len(README.splitlines()) <= 150


def test_python_blocks_run(tmp_path, monkeypatch):
    host = tiny_host("qwen2_audio")
    transformers = pytest.importorskip("transformers")
    processor = SimpleNamespace(from_pretrained=lambda _: lambda **turn: turn)
    model = SimpleNamespace(from_pretrained=lambda _: host)
    monkeypatch.setattr(transformers, "AutoProcessor", processor)
    monkeypatch.setattr(transformers, "Qwen2AudioForConditionalGeneration", model)
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) >= 2
    for text in blocks("python"):
        names = {"turns": [tiny_inputs(host, [[4]], seed=i) for i in range(2)]}
        exec(compile(text, "README.md", "exec"), names)
        if "mal" in names:
            assert names["mal"].dialogues.latest("call-17").states.keys() == {None, "A"}
            assert (tmp_path / "my-mal/adapter_model.safetensors").exists()
        else:
            assert names["y"].isfinite().all()
            assert names["out"].output.isfinite().all()


@pytest.mark.parametrize("line", [x for text in blocks("bash") for x in text.splitlines() if x])
def test_commands_exist(line):
    command = line.split("#")[0].split()
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif command[:2] == ["pip", "install"]:
        if sys.version_info >= (3, 11):
            import tomllib

            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for extra in re.findall(r"\[([\w,]+)\]", line):
                assert set(extra.split(",")) <= project["optional-dependencies"].keys()
    else:
        raise AssertionError(f"the README shows a command that this test does not know: {line}")
