"""The versions that are declared, locked and tested belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [
    Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines
]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_the_oldest_versions_are_the_floors():
    floors = {
        canonical(wanted.name): f"=={spec.version}"
        for wanted in DECLARED
        for spec in wanted.specifier
        if spec.operator == ">="
    }
    oldest = requirements("constraints-oldest.txt")
    assert {canonical(pinned.name): str(pinned.specifier) for pinned in oldest} == floors


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_one_version_of_everything(python):
    here = {"python_version": python, "python_full_version": f"{python}.9"}
    here |= {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}

    def applies(marker: Marker | None) -> bool:
        return marker is None or marker.evaluate(here)

    pins = [pin for pin in requirements("constraints.txt") if applies(pin.marker)]
    locked = {canonical(pin.name): pin.specifier for pin in pins}
    assert len(locked) == len(pins)  # no two pins of one package
    for wanted in filter(lambda wanted: applies(wanted.marker), DECLARED):
        if wanted.name != PROJECT["name"]:
            (pin,) = locked[canonical(wanted.name)]
            assert pin.operator == "=="
            assert Version(pin.version) in wanted.specifier, wanted


def test_no_file_of_versions_names_a_place():
    for name in ("constraints.txt", "constraints-oldest.txt"):
        assert not re.search(r"://|^\s*-|@", (ROOT / name).read_text(), re.MULTILINE)
