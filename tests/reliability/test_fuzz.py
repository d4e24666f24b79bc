"""Bad input: a short run of the fuzzer, what it has found before, and hypothesis on the files."""

from __future__ import annotations

import base64
import io
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.serve_vllm import parse, read_audio
from mal_kernels import MALAdapter, MALConfig, MemoryState, ops
from mal_kernels.dialogues.backing import revision_of
from mal_kernels.dialogues.files import pack, read_tensors
from mal_kernels.errors import (
    ArgumentError,
    AudioFileError,
    CheckpointError,
    HostError,
    MALError,
)
from mal_kernels.store import MemoryStore
from mal_kernels.testing import make_inputs
from tests.reliability.echo import echo_adapter, turn_tokens
from tests.reliability.fuzz import TARGETS, Finding, fuzz, run_case, saved_adapter, stored
from tests.support.dialogues import new_store

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_a_short_run_finds_nothing():
    tried, findings = fuzz(600, first=1_000_000)
    assert findings == []
    assert sum(sum(counts.values()) for counts in tried.values()) == 600
    # it tries what works and what does not
    assert all(counts["worked"] and counts["refused"] for counts in tried.values())


@pytest.mark.parametrize("error", [TypeError("x"), MemoryError(), Finding("x")])
def test_the_fuzzer_notices(monkeypatch, error):
    def broken(draw):
        raise error

    monkeypatch.setitem(TARGETS, "store", broken)
    assert run_case("store", 0) is error
    monkeypatch.setitem(TARGETS, "store", lambda draw: None)
    assert run_case("store", 0) == "worked"


# --- what was found -------------------------------------------------------------------------


def test_nested_headers_and_numbers_without_end(tmp_path):
    for head in (b'{"a":' * 100_000, b"1" * 10_000, b'{"a":NaN}', b"[]", b"\xff", b""):
        blob = len(head).to_bytes(8, "little") + head
        with pytest.raises(CheckpointError):
            new_store().load(write(tmp_path, blob))
        assert len(revision_of(blob)) in (40, 64)  # of any bytes, without reading them as a file


def write(folder, blob: bytes):
    (folder / "file").write_bytes(blob)
    return folder / "file"


def test_a_header_longer_than_the_file_is_not_allocated(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read"):
        new_store().load(write(tmp_path, struct.pack("<Q", 2**62) + b"{}"))


def test_what_is_no_file_is_not_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")  # would block
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            new_store().load(path)


@pytest.mark.parametrize("field", ["heads", "head_dim", "expansion", "depth", "hidden_size"])
def test_a_config_cannot_ask_for_more_than_its_weights(tmp_path, field):
    weights, config = saved_adapter()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    for value in (4096, 2**20, 10**30):
        changed = {**json.loads(config), field: value}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError):
            MALAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", None),
        ("state", MemoryState((), ())),
        ("state", MemoryState("x", None)),
        ("activation", {}),
        ("residual_norm", "no"),
        ("cu_seqlens", 3),
        ("init", 5),
        ("lr", None),
        ("k", "x"),
        ("v", None),
    ],
)
def test_arguments_of_another_kind(name, value):
    _, k, v, lr, momentum, decay, state, options = make_inputs(dtype=torch.float32)
    named = dict(k=k, v=v, lr=lr, momentum=momentum, decay=decay, state=state, **options)
    with pytest.raises(ArgumentError, match=f"^{name}"):
        ops.memory_update(**{**named, name: value})


def test_indices_and_parameters_of_another_kind():
    hidden, index = torch.randn(1, 4, 6), torch.arange(4)
    state = MemoryState.from_weights((torch.randn(1, 2, 3, 3),))
    params = ops.ReadParams(torch.ones(6), *torch.randn(2, 6, 6), torch.randn(6, 6))
    good = dict(hidden=hidden, token_index=index, state_index=index * 0, state=state, params=params)
    ops.aligned_residual_read(**good)
    for name, value in (
        ("hidden", None),
        ("token_index", 3),
        ("state_index", index[:2]),
        ("state", MemoryState((), ())),
        ("params", tuple(params)),
        ("params", params._replace(w_q=params.w_q.cfloat())),
        ("params", params._replace(norm="x")),
    ):
        with pytest.raises(ArgumentError, match=f"^{name}"):
            ops.aligned_residual_read(**{**good, name: value})
    with pytest.raises(ArgumentError, match=r"^update"):
        ops.momentum_scan("x", None, None)


def test_a_position_must_fit():
    *args, state, options = make_inputs(position=True, dtype=torch.float32)
    for position in (3, torch.zeros(1, dtype=torch.int64), torch.zeros(2), "x"):
        with pytest.raises(ArgumentError, match="position"):
            ops.neural_memory(*args, state._replace(position=position), **options)


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_chunk_longer_than_the_call_costs_nothing(tokens):
    _, *args, options = make_inputs(tokens=tokens, chunk_size=4, dtype=torch.float32)
    want = ops.memory_update(*args, **options)
    have = ops.memory_update(*args, **{**options, "chunk_size": 2**31})
    assert torch.equal(have.surprise, want.surprise)


def test_huge_bounds_of_gradients():
    for value in (1e38, 1e-45):
        with pytest.raises(ArgumentError, match="max_grad_norm"):
            MALConfig(max_grad_norm=value)


@pytest.mark.parametrize("hidden", [3, "x", [], torch.ones(2), torch.ones(1, 4, 16, dtype=int)])
def test_hidden_states_of_another_kind(hidden):
    host, mal = echo_adapter()
    with mal.dialogue("a") as dialogue, pytest.raises((HostError, ArgumentError)):
        host(inputs_embeds=hidden)
    assert dialogue.turns == [0]


def test_hidden_states_of_another_width():
    host, mal = echo_adapter()
    with mal.dialogue("a"), pytest.raises(HostError, match="adapter is for 16 features"):
        host(inputs_embeds=turn_tokens(0, 0)[..., :8])


# --- hypothesis -----------------------------------------------------------------------------


@quick
@given(at=st.integers(0), byte=st.integers(1, 255))
def test_any_changed_byte_is_noticed(at, byte):
    blob = bytearray(stored("call-0"))
    blob[at % len(blob)] ^= byte
    _, mal = echo_adapter()
    mal.dialogues.backing = backing = MemoryStore()
    backing.put("call-0", bytes(blob))
    with pytest.raises(CheckpointError):
        mal.dialogues.latest("call-0")


@quick
@given(keep=st.integers(0))
def test_any_shorter_file_is_refused(keep):
    blob = stored("call-0")
    with pytest.raises(CheckpointError):
        read_tensors(blob[: keep % len(blob)], "dialogues", lambda header: {})


@quick
@given(
    header=st.dictionaries(st.text(), st.one_of(st.none(), st.integers(), st.text())),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=9),
)
def test_what_is_packed_comes_back(header, values):
    header = {k: v for k, v in header.items() if k not in ("kind", "version", "checksum")}
    tensor = torch.tensor(values, dtype=torch.float32)
    blob = pack("x", {"t": tensor}, header)
    tensors, found = read_tensors(blob, "x", lambda header: {"t": tensor.to("meta")})
    assert torch.equal(tensors["t"], tensor)
    assert {key: found[key] for key in header} == header
    assert pack("x", {"t": tensor}, header) == blob


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(values=st.dictionaries(st.sampled_from(list(MALConfig().to_dict())), json_values))
def test_any_config(values):
    try:
        config = MALConfig.from_dict({**MALConfig().to_dict(), **values})
    except MALError:
        return
    assert MALConfig.from_dict(config.to_dict()) == config


@quick
@given(request=json_values, data=st.binary(max_size=64))
def test_any_request(request, data):
    with pytest.raises(MALError):
        parse(request)
    audio = {"data": base64.b64encode(data).decode()}
    with pytest.raises(AudioFileError):
        read_audio(audio, 16000)


def test_a_recording_that_claims_to_be_endless():
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, torch.zeros(100).numpy(), 16000, format="WAV", subtype="PCM_16")
    blob = bytearray(data.getvalue())
    blob[40:44] = struct.pack("<I", 2**32 - 1)  # bytes of samples
    wave = read_audio({"data": base64.b64encode(bytes(blob)).decode()}, 16000)
    assert len(wave) == 100
