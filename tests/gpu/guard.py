"""A pytest plugin for the tests of a session: a broken device costs one test, not all after it.

``-p tests.gpu.guard``; the names of what is collected are left in ``$MAL_COLLECTED``.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Writes down what will be run, so that a time-out shows what was not."""
    # every worker of xdist collects all
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0" and "MAL_COLLECTED" in os.environ:
        names = [item.nodeid for item in session.items]
        Path(os.environ["MAL_COLLECTED"]).write_text("\n".join(names))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """Ends a process whose device has failed: after that every call of it fails."""
    report = yield
    if call.excinfo and "CUDA error" in str(call.excinfo.value):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist counts the test as failed and starts another worker
        pytest.exit(f"{item.nodeid}: {call.excinfo.value}", returncode=1)
    return report
