"""The numbers that decoder and executor share, as ``csrc/ptx/codes.inc`` lists them."""

from __future__ import annotations

import re

from ..._native.build import source_folder


def _listed(kind: str) -> list[str]:
    text = re.sub(r"//.*", "", (source_folder() / "ptx/codes.inc").read_text())
    return re.findall(rf"\b{kind}\(([\w, ]+)\)", text)


OPS = _listed("OP")
OP = {name: i for i, name in enumerate(OPS)}
BYTES = {name: int(size) for name, size in (line.split(", ") for line in _listed("TYPE"))}
TYPE = {name: i for i, name in enumerate(BYTES)}
COMPARISON = {name: i for i, name in enumerate(_listed("COMPARISON"))}
SPECIAL = {"%" + re.sub(r"_([xyz])$", r".\1", name): i for i, name in enumerate(_listed("SPECIAL"))}
