"""Runs the battery of every host and writes what passed into docs/hosts.md.

    python -m tools.hosts_table              # run with the installed transformers, then write
    python -m tools.hosts_table csm moshi    # run these hosts only
    python -m tools.hosts_table --render     # write from the results that are there

Results of every version of transformers are kept in docs/hosts.json. A host counts as verified with
a version if all its tests ran there and passed.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, TABLE = ROOT / "docs" / "hosts.json", ROOT / "docs" / "hosts.md"
BEGIN, END = "<!-- hosts: written by python -m tools.hosts_table -->", "<!-- end of hosts -->"
BATTERY = ("test_tiny_hosts.py", "test_hosts.py", "test_replicas.py")  # of tests/hosts

Results = dict[str, dict[str, dict[str, int]]]  # version → host → outcome → tests


def host_of(item: Any) -> str | None:
    """The host that a test is about: its parameter ``name``."""
    return getattr(getattr(item, "callspec", None), "params", {}).get("name")


class Outcomes:
    """A pytest plugin that runs the tests of ``hosts`` (all, if none) and counts their outcomes."""

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts
        self.of_host: dict[str, Counter[str]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keeps the tests of the hosts that are asked for."""
        wanted = self.hosts or list(kinds())
        items[:] = [item for item in items if host_of(item) in wanted]

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """Counts the outcome of a test."""
        if call.when == "teardown":
            return
        outcome = "passed"
        if call.excinfo is not None:
            outcome = "skipped" if call.excinfo.typename == "Skipped" else "failed"
        if call.when == "call" or outcome != "passed":
            self.of_host.setdefault(host_of(item), Counter())[outcome] += 1


def run(hosts: list[str]) -> tuple[str, dict[str, dict[str, int]]]:
    """The version of transformers, and how many tests of each host had which outcome in it."""
    import pytest

    outcomes = Outcomes(hosts)
    pytest.main(
        ["-q", "-p", "no:cacheprovider", *(str(ROOT / "tests/hosts" / name) for name in BATTERY)],
        plugins=[outcomes],
    )
    import transformers  # not before: pytest wants to be first

    return transformers.__version__, {k: dict(v) for k, v in sorted(outcomes.of_host.items())}


def kinds() -> dict[str, tuple[str, str, str, str]]:
    """Lists of each host its class, the sites, how it generates, and what is heard."""
    from mal_kernels.testing.hosts import ENCODERS, RECIPES, REPLICAS, STREAMING

    known = {}
    for name, recipe in RECIPES.items():
        decoding = "greedy, beams" if recipe.beams else "greedy, sampling"
        known[name] = (recipe.model, "embeds, layer", decoding, "clips")
    for name, recipe in ENCODERS.items():
        known[name] = (recipe.model, "encoder", "greedy, beams", "clips")
    for name, recipe in STREAMING.items():
        known[name] = (recipe.model, "embeds, layer", "greedy", "stream")
    for name in REPLICAS:
        site = "encoder" if name.startswith("audio_flamingo") else "embeds, layer"
        decoding = "greedy" if name in ("ltu", "qwen_audio") else "greedy, beams"
        known[name] = ("replica", site, decoding, "clips")
    return known


def verified(results: Results, name: str) -> list[str]:
    """Versions in which all tests of a host ran and passed, newest first."""

    def good(outcomes: dict[str, int]) -> bool:
        return outcomes.get("passed", 0) > 0 and not outcomes.get("failed", 0)

    versions = [v for v, hosts in results.items() if good(hosts.get(name, {}))]
    return sorted(versions, key=lambda v: tuple(map(int, v.split("."))), reverse=True)


def render(results: Results) -> str:
    """The table in Markdown, between the markers."""
    lines = [
        "| host | class | sites | `generate` | hears | verified with transformers |",
        "|---|---|---|---|---|---|",
    ]
    for name, (cls, sites, decoding, heard) in sorted(kinds().items()):
        versions = ", ".join(verified(results, name)) or "none"
        cls = cls if cls == "replica" else f"`{cls}`"
        lines.append(f"| `{name}` | {cls} | {sites} | {decoding} | {heard} | {versions} |")
    return "\n".join([BEGIN, *lines, END])


def write(results: Results) -> None:
    """Keeps ``results`` and puts their table in the place of the one that is there."""
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    before, _, rest = TABLE.read_text().partition(BEGIN)
    TABLE.write_text(before + render(results) + rest.partition(END)[2])


def load() -> Results:
    """The results that are there."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    """Runs the tests of the hosts and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("hosts", nargs="*", choices=[[], *kinds()], metavar="host")
    parser.add_argument("--render", action="store_true", help="do not run the battery")
    arguments = parser.parse_args()
    results = load()
    if not arguments.render:
        version, outcomes = run(arguments.hosts)
        results = load()  # another version may have been written meanwhile
        results[version] = {**(results.get(version, {}) if arguments.hosts else {}), **outcomes}
    write(results)


if __name__ == "__main__":
    main()
