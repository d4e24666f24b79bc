"""What every test gets: a seed, few threads, and uninitialised memory full of NaN."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time

# read when cuBLAS is first used; without it deterministic mode refuses its matmuls
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a bug
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

# no tests; and a doctest would import cuda.py there as what NVIDIA's packages call cuda
collect_ignore = ["support"]


def pytest_configure() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, torch.get_num_threads() // workers)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # whoever asks for the GPU tests wants failures, not skips, from a machine without one
    if torch.cuda.is_available() or config.option.markexpr == "gpu":
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Deterministic mode fills every ``torch.empty``, ``empty_like`` and ``new_empty`` with NaN.

    An op that forgets to write part of its output fails instead of passing on a lucky zero.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """A Redis server of its own on loopback."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    pytest.importorskip("redis", reason="no redis-py: pip install redis")
    folder = tmp_path_factory.mktemp("redis")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--dir", str(folder)], stdout=log, stderr=log)
    try:
        yield wait_for(f"redis://127.0.0.1:{port}/0")
    finally:
        server.terminate()
        server.wait(10)


def wait_for(url: str) -> str:
    from mal_kernels.errors import StoreError
    from mal_kernels.store import RedisStore

    for _ in range(100):
        try:
            RedisStore(url).get("x")
            return url
        except StoreError:
            time.sleep(0.05)
    raise AssertionError("redis-server does not answer")


@pytest.fixture
def host():
    """A tiny Qwen2-Audio, what most tests of the adapter attach to."""
    from mal_kernels.testing import tiny_host

    return tiny_host("qwen2_audio")
