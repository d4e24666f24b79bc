"""The portable backend computes without denormals and leaves the setting as it was."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch

from mal_kernels import ops
from mal_kernels._torch import portable
from mal_kernels.testing import make_inputs, results

SUPPORTED = torch.set_flush_denormal(True)
torch.set_flush_denormal(False)
neural_memory = functools.partial(ops.neural_memory, backend="reference")
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="this processor cannot flush denormals")


@pytest.fixture(params=[False, True], ids=["kept", "flushed"])
def setting(request):
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def denormal():
    return torch.tensor([1e-38]) * 1e-3


def test_probe_is_the_setting(setting):
    assert portable.flushes_denormals() == setting == bool(denormal() == 0)


def test_a_call_flushes_and_restores(setting):
    with portable.portable(torch.device("cpu")):
        assert denormal() == 0
    assert bool(denormal() == 0) == setting
    results(neural_memory, make_inputs(dtype=torch.float32))
    assert bool(denormal() == 0) == setting


def test_an_error_restores(setting, monkeypatch):
    def fail(*_):
        assert denormal() == 0
        raise RuntimeError("planted")

    monkeypatch.setattr("mal_kernels._torch.neural_memory.write", fail)
    *args, options = make_inputs(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="planted"):
        neural_memory(*args, **options)
    assert bool(denormal() == 0) == setting


@pytest.mark.parametrize("step", ["token", "chunk"])
def test_normal_numbers_have_the_same_bits(step, monkeypatch):
    inputs = make_inputs(dtype=torch.float32, step=step, residual_norm=True, init=True)
    flushed = results(neural_memory, inputs)
    monkeypatch.setattr(portable, "flushes_denormals", lambda: True)  # so nothing is set
    kept = results(neural_memory, inputs)
    assert all(torch.equal(x, kept[name]) for name, x in flushed.items())


def test_no_worker_thread_inherits_the_setting():
    # a worker that is started while denormals are flushed would flush them for good
    code = """
import torch
from mal_kernels._torch.portable import portable
torch.set_num_threads(1)
x = torch.full((400_000,), 1e-38)
torch.set_num_threads(2)
with portable(torch.device("cpu")):
    x * 1e-3
assert (x * 1e-3 != 0).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
