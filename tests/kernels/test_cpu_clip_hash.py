"""The native hash of frames gives the numbers of the portable one, and a window is cheap."""

from __future__ import annotations

import time

import pytest
import torch

from mal_kernels._cpu import library
from mal_kernels.hosts import clips, fingerprint
from tests.support.native import needs_library

needs_library()


def both(monkeypatch, function, *args, **options):
    """What ``function`` returns without and with the library."""
    found = []
    for loaded in (False, True):
        monkeypatch.setattr(library, "is_loaded", lambda loaded=loaded: loaded)
        found.append(function(*args, **options))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(2, 128, 300), (1, 1, 1), (3, 7, 1), (2, 5, 257), (0, 8, 9)])
@pytest.mark.parametrize("time", [1, 2])
def test_the_numbers_are_the_same(monkeypatch, dtype, shape, time):
    x = (torch.randn(shape) * 1e3).to(dtype)
    portable, native = both(monkeypatch, fingerprint, x, time=time, key=b"key")
    assert native == portable
    assert len(set(native)) == len(x)


def test_frames_that_lie_apart_waves_and_embeddings(monkeypatch):
    apart = torch.randn(2, 300, 60, 2)[..., 0]
    for x, options in ((apart, {"time": 1}), (torch.randn(2, 1000), {})):
        portable, native = both(monkeypatch, fingerprint, x, **options)
        assert native == portable
    embeds = torch.randn(2, 9, 16)
    spoken = embeds[0, 2:5]
    portable, native = both(monkeypatch, clips.placed, embeds, [spoken])
    assert torch.equal(native, portable)
    assert native[0].nonzero().flatten().tolist() == [2, 3, 4]


@pytest.mark.slow
def test_16_bytes_a_vector_give_the_same_numbers(monkeypatch):
    x = torch.randn(1, 128, 700)
    portable = both(monkeypatch, fingerprint, x)[0]
    monkeypatch.setattr(library, "target", lambda: "portable")
    assert both(monkeypatch, fingerprint, x)[1] == portable


def test_a_window_of_30_seconds_costs_as_much_as_to_copy_it_a_few_times(monkeypatch):
    x, mask = torch.randn(1, 128, 3000), torch.ones(1, 3000, dtype=torch.long)
    monkeypatch.setattr(library, "is_loaded", lambda: True)

    def least(function) -> float:
        costs = []
        for _ in range(50):
            begin = time.thread_time()
            function()
            costs.append(time.thread_time() - begin)
        return min(costs)

    assert least(lambda: fingerprint(x, mask)) < 12 * least(x.clone)
