"""pytest-benchmark writes the machine as this benchmark describes it, and no single times."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from bench import Result, machine


def pytest_configure(config: pytest.Config) -> None:
    """Flushes denormals for all providers while this process lives."""
    stack = ExitStack()
    stack.enter_context(machine.flushed_denormals())
    config.add_cleanup(stack.close)


def pytest_benchmark_update_machine_info(machine_info: Result) -> None:
    """Replaces pytest-benchmark's description, which names the computer."""
    import torch

    machine_info.clear()
    machine_info |= machine.describe(torch.get_num_threads()) | {"rates": machine.rates()}


def pytest_benchmark_update_json(output_json: Result) -> None:
    """Drops every single time, of which the statistics are enough."""
    for row in output_json["benchmarks"]:
        del row["stats"]["data"]
