"""What is saved loads: half precision, another default dtype, torch.compile, interrupts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mal_kernels import MALAdapter, MALConfig
from mal_kernels.adapter import hub
from mal_kernels.errors import ArgumentError, CheckpointError, StoreError

CONFIG = MALConfig(heads=2, head_dim=8, hidden_size=32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_adapter_of_any_dtype_comes_back_as_float32(tmp_path, dtype):
    mal = MALAdapter(CONFIG).to(dtype)
    mal.save_pretrained(tmp_path)
    again = MALAdapter.from_pretrained(tmp_path)
    for ours, theirs in zip(mal.parameters(), again.parameters(), strict=True):
        assert theirs.dtype == torch.float32
        assert torch.equal(ours.float(), theirs)


def test_weights_are_float32_whatever_the_default_dtype(tmp_path):
    torch.set_default_dtype(torch.bfloat16)
    try:
        mal = MALAdapter(CONFIG)
        mal.save_pretrained(tmp_path)
        again = MALAdapter.from_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in (*mal.parameters(), *again.parameters())} == {torch.float32}


def test_a_compiled_memory_is_saved_under_the_names_of_the_plain_one(tmp_path):
    mal = MALAdapter(CONFIG)
    plain = mal.memory
    mal.memory = torch.compile(plain, backend="eager")
    mal.save_pretrained(tmp_path)
    again = MALAdapter.from_pretrained(tmp_path)
    assert torch.equal(again.memory.to_k.weight, plain.to_k.weight)


def test_half_of_a_save_is_refused(tmp_path, monkeypatch):
    MALAdapter(CONFIG).save_pretrained(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "write_file", interrupt)
    other = MALAdapter(dataclasses.replace(CONFIG, max_lr=0.1))
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"differs from the configuration .* in max_lr:"):
        MALAdapter.from_pretrained(tmp_path)


def test_where_an_adapter_cannot_be_saved(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot make the folder"):
        MALAdapter(CONFIG).save_pretrained(tmp_path / "file" / "below")


def test_a_state_is_loaded_by_torch_without_trust(tmp_path):
    state = MALAdapter(CONFIG).memory.initial_state(2).detach()
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert type(again) is type(state)
    assert all(map(torch.equal, again.tensors(), state.tensors()))


@pytest.mark.parametrize(
    "values",
    [
        {"momentum_init": 0.99999999},
        {"decay_init": 1e-46},
        {"lr_init": (0.1, 0.5 - 1e-12)},
        {"lr_init": (1e-46, 0.1)},
        {"max_lr": 1e39},
        {"max_lr": 1e-45},
    ],
)
def test_rates_whose_logit_is_infinite_are_refused(values):
    with pytest.raises(ArgumentError, match=next(iter(values))):
        MALConfig(heads=2, **values)


@pytest.mark.parametrize("max_lr", [1e-30, 1e30])
def test_an_adapter_at_the_bounds_of_its_rates_comes_back(tmp_path, max_lr):
    mal = MALAdapter(dataclasses.replace(CONFIG, max_lr=max_lr))
    assert all(x.isfinite().all() for x in mal.parameters())
    mal.save_pretrained(tmp_path)
    assert MALAdapter.from_pretrained(tmp_path).config.max_lr == max_lr
