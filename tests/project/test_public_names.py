"""Names, operators and files that others rely on are those of version 0.1.0, and MissingPackage."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

import pytest
import torch

import mal_kernels
from mal_kernels import MALAdapter, MALConfig, NeuralMemory

GOLDEN = Path(__file__).parents[1] / "golden"

NAMES = {
    "mal_kernels": [
        *("ArgumentError", "AudioFileError", "BackendUnavailable", "CheckpointError"),
        *("DetachedWarning", "Dialogue", "DialogueStore", "HostError", "HostSpec", "MALAdapter"),
        *("MALConfig", "MALError", "MALWarning", "MemoryState", "MissingPackage", "NeuralMemory"),
        *("NoDialogueWarning", "StoreError", "TrainingWarning", "TurnReport"),
        "ops",
        "register_host",
    ],
    "mal_kernels.ops": [
        *("MemoryUpdate", "MomentumScan", "NeuralMemoryOutput", "ReadParams"),
        *("aligned_residual_read", "aligned_residual_read_", "explain", "memory_read"),
        *("memory_update", "momentum_scan", "neural_memory"),
    ],
}
# where documents, docstrings and examples ever imported from
PATHS = {
    "mal_kernels.store": [
        *("DirectoryStore", "KeyValueStore", "MemoryStore", "RedisStore", "SharedStore"),
    ],
    "mal_kernels.hosts": [
        *("BUILT_IN", "Clip", "Host", "HostSpec", "find_decoder", "fingerprint"),
        *("last_effective_layer", "placed", "register_host"),
    ],
    "mal_kernels.testing": [
        *("assert_all_within_budget", "assert_parity", "assert_within_budget", "low_precision"),
        *("make_inputs", "results", "tiny_host", "tiny_inputs"),
    ],
    "mal_kernels.adapter": ["MALAdapter", "TurnReport"],
    "mal_kernels.config": ["MALConfig"],
    "mal_kernels.memory": ["NeuralMemory"],
    "mal_kernels.state": ["MemoryState"],
    "mal_kernels.errors": ["ArgumentError", "BackendUnavailable", "CheckpointError", "MALError"],
    "mal_kernels.reference": ["recurrence", "memory_read", "momentum_scan"],
}
KEYS = [
    *("norm", "to_q.weight", "to_k.weight", "to_v.weight", "to_gate.weight", "to_out.weight"),
    *("to_rates.weight", "to_rates.bias"),
]

# SHA-256 of what tests/golden/0.1.0 becomes when it is loaded and saved
SAVED = {
    "README.md": "0313d8fb6d3e404eb8273600eaee25776fe049d8178fc381766cb319b4abc4b3",
    "adapter_config.json": "82544da6a4b2fb14c32f2e9d701b2541890e9538ec5e867e026698368911f25a",
    "adapter_model.safetensors": "8b91b8a876dd2ab2ac0e34b76c44083de8b24b5a2bf08121315b0a551ce5426c",
    "dialogues.safetensors": "93899c865b62b6db8725eee5b29b1186781df8afbf2dd9a9fed5c9f4e6dc74ba",
}


@pytest.mark.parametrize("module", NAMES)
def test_what_a_star_imports(module):
    assert sorted(importlib.import_module(module).__all__) == NAMES[module]


@pytest.mark.parametrize("module", PATHS)
def test_paths_that_documents_named_still_lead_there(module):
    found = importlib.import_module(module)
    assert [name for name in PATHS[module] if not hasattr(found, name)] == []


def test_peft_finds_the_method_where_it_was():
    pytest.importorskip("peft", reason="peft is an extra: pip install peft")
    assert importlib.import_module("mal_kernels.integrations.peft").MALPeftConfig


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (dict(depth=1), 1),
        (dict(depth=1, zero_start=True), 0),
        ({}, 2),
        (dict(zero_start=True), 1),
        (dict(residual_norm=True), 3),
        (dict(depth=3, residual_norm=True), 4),
    ],
)
def test_keys_of_a_state_dict(options, weights):
    keys = KEYS + [f"init.{i}" for i in range(weights)]
    assert list(NeuralMemory(12, **options).state_dict()) == keys
    adapter = MALAdapter(MALConfig(hidden_size=12, **options))
    assert list(adapter.state_dict()) == [f"memory.{key}" for key in keys]


def test_schemas_of_the_operators():
    assert mal_kernels.ops  # which registers them
    schemas = [x for x in torch._C._jit_get_all_schemas() if x.name.startswith("mal_kernels::")]
    assert sorted(map(str, schemas)) == json.loads((GOLDEN / "schemas.json").read_text())


def test_files_that_are_loaded_and_saved_are_those_of_the_last_format(tmp_path):
    """Those of 0.1.0 have no checksum and fewer fields; their weights are the same bytes."""
    adapter = MALAdapter.from_pretrained(GOLDEN / "0.1.0")
    adapter.save_pretrained(tmp_path)
    adapter.dialogues.load(GOLDEN / "0.1.0" / "dialogues.safetensors")
    adapter.dialogues.save(tmp_path / "dialogues.safetensors")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: hashlib.sha256(x).hexdigest() for name, x in files.items()} == SAVED
    for name in ("adapter_model.safetensors", "dialogues.safetensors"):
        old = (GOLDEN / "0.1.0" / name).read_bytes()
        assert after_header(files[name]) == after_header(old)


def after_header(file: bytes) -> bytes:
    """The tensors of a safetensors file, whose first 8 bytes are the length of its header."""
    return file[8 + int.from_bytes(file[:8], "little") :]
