"""A kernel's text: its parameters, the shared memory it names, and its statements by line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .codes import BYTES

SHARED = re.compile(
    r"^[ \t]*(?:\.(?:extern|visible|weak)\s+)?\.shared\s+\.align\s+(\d+)\s+\.\w+\s+([\w$]+)"
    r"(?:\[(\d*)\])?;",
    re.MULTILINE,
)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{]*)\{", re.DOTALL)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.(?:global|shared)\s+)?"
    r"(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?"
)
DYNAMIC_ALIGNMENT = 1024


class Parameter(NamedTuple):
    """Where a parameter stands among the bytes of a launch."""

    offset: int
    size: int


class Statement(NamedTuple):
    """One statement, label or brace of a kernel's body; ``kind`` is one of ``;:{}``."""

    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class Source:
    """A kernel as it is written."""

    name: str
    parameters: dict[str, Parameter]
    shared: dict[str, int]  # offset of a variable; the dynamic one stands behind all others
    static_bytes: int
    has_dynamic: bool
    body: str
    first_line: int
    places: dict[int, str]  # line of the PTX: file and line that it was compiled from

    @classmethod
    def of(cls, text: str, name: str | None = None) -> Source:
        """Reads the kernel called ``name``, or the first."""
        text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.S)
        entry = next(e for e in ENTRY.finditer(text) if name in (None, e[1]))
        end = _closing(text, entry.end())
        shared, static_bytes, has_dynamic = _shared_variables(text)
        return cls(
            name=entry[1],
            parameters=_parameters(entry[2] or ""),
            shared=shared,
            static_bytes=static_bytes,
            has_dynamic=has_dynamic,
            body=text[entry.end() : end],
            first_line=text[: entry.end()].count("\n") + 1,
            places=_places(text),
        )

    @property
    def parameter_bytes(self) -> int:
        """The bytes of all parameters."""
        return max((p.offset + p.size for p in self.parameters.values()), default=0)

    def statements(self) -> Iterator[Statement]:
        """The body's statements, labels and braces of blocks, in order."""
        text, depth = "", 0
        for line, raw in enumerate(self.body.split("\n"), self.first_line):
            code = raw.split("//")[0]
            if code.lstrip().startswith((".loc", ".file", ".pragma", ".section", ".b8 ", ".b32 ")):
                continue
            for character in code + " ":
                if character in "{}" and not depth and not text.strip():
                    yield Statement(character, "", line)
                    continue
                depth += (character == "{") - (character == "}")
                if character == ";":
                    yield Statement(";", text.strip(), line)
                    text = ""
                elif character == ":" and re.fullmatch(r"\s*[\w$]+", text):
                    yield Statement(":", text.strip(), line)
                    text = ""
                else:
                    text += character


def _closing(text: str, start: int) -> int:
    """Where the brace closes that is open before ``start``."""
    depth = 1
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.start()
    raise ValueError("a kernel's body does not end")


def _shared_variables(text: str) -> tuple[dict[str, int], int, bool]:
    offsets: dict[str, int] = {}
    dynamic, end = [], 0
    for alignment, name, size in dict.fromkeys(found.groups() for found in SHARED.finditer(text)):
        if not size or not int(size):
            dynamic.append(name)
            continue
        offsets[name] = -(-end // int(alignment)) * int(alignment)
        end = offsets[name] + int(size)
    if dynamic:
        end = -(-end // DYNAMIC_ALIGNMENT) * DYNAMIC_ALIGNMENT
    return offsets | dict.fromkeys(dynamic, end), end, bool(dynamic)


def _parameters(text: str) -> dict[str, Parameter]:
    found, end = {}, 0
    for alignment, kind, name, count in PARAMETER.findall(text):
        size = BYTES[kind] * int(count or 1)
        align = int(alignment or BYTES[kind])
        offset = -(-end // align) * align
        found[name], end = Parameter(offset, size), offset + size
    return found


def _places(text: str) -> dict[int, str]:
    """Names file and line that ``.loc`` gives to the lines of PTX up to the next."""
    files = dict(re.findall(r'^[ \t]*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text, re.MULTILINE))
    found, place = {}, ""
    for number, line in enumerate(text.split("\n"), 1):
        if loc := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            place = f"{files.get(loc[1], '?')}:{loc[2]}"
        elif place:
            found[number] = place
    return found
