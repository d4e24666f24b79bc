"""The store of dialogues without a host: turns, undo, bounds, speakers, files not to be trusted."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mal_kernels import MemoryState
from mal_kernels.dialogues.files import UNSIGNED
from mal_kernels.dialogues.snapshot import EMPTY, Snapshot
from mal_kernels.errors import ArgumentError, CheckpointError, StoreError
from tests.support.dialogues import CONFIG, dialogue_of, equal, new_store, snapshot

# --- turns ----------------------------------------------------------------------------------


def test_commit_then_undo_brings_back_the_same_objects():
    store = new_store()
    first, second = snapshot(store, 1.0, clips=[7]), snapshot(store, 2.0, clips=[7, 8])
    store.commit({"a": first})
    store.commit({"a": second, "b": first})
    assert store.latest("a") is second
    store.undo(["a", "b"])
    assert store.latest("a") is first
    assert store.latest("b") is EMPTY
    store.undo(["a", "b"])  # b has nothing left, a has
    assert store.latest("a") is EMPTY
    with pytest.raises(ArgumentError, match=r"\['a', 'b'\].*no turn left"):
        store.undo(["a", "b"])


def test_undo_depth_bounds_what_is_kept():
    store = new_store(undo_depth=2)
    for i in range(5):
        store.commit({"a": snapshot(store, float(i))})
    store.undo(["a"])
    store.undo(["a"])
    with pytest.raises(ArgumentError, match="undo_depth=2"):
        store.undo(["a"])
    assert float(store.latest("a").states[None].weights[0].max()) == 2.0


def test_max_dialogues_drops_the_one_written_least_recently():
    store = new_store(max_dialogues=2)
    for name in ("a", "b", "a", "c"):
        store.commit({name: snapshot(store, 1.0)})
    assert list(store) == ["a", "c"]


def test_nbytes_counts_the_present_only():
    store = new_store()
    for _ in range(3):
        store.commit({"a": snapshot(store, 1.0, None, "A")})
    assert store.nbytes == 2 * store.initial_state(1).nbytes


def test_forget_erases_what_could_be_undone_too():
    store = new_store()
    store.commit({"a": snapshot(store, 1.0), "b": snapshot(store, 1.0)})
    store.forget(["a", "never heard of"])
    assert list(store) == ["b"]
    with pytest.raises(ArgumentError):
        store.undo(["a"])
    store.forget()
    assert len(store) == 0


def test_detach_reaches_what_could_be_undone_too():
    store = new_store()
    state = store.initial_state(1)
    assert state.weights[0].requires_grad
    store.commit({"a": Snapshot({None: state}, (1,))})
    store.commit({"a": Snapshot({None: state, "A": state}, (1, 2))})
    dialogue_of(store, "a").detach()
    assert not any(w.requires_grad for s in store.latest("a").states.values() for w in s.weights)
    store.undo(["a"])
    assert not store.latest("a").states[None].weights[0].requires_grad


@pytest.mark.parametrize(
    ("written", "heard", "known"),
    [
        ((), (1,), 0),
        ((1, 2, 3), (1, 2, 3, 4), 3),
        ((1, 2, 3), (2, 3, 4), 2),  # a window of the history
        ((1, 2, 3), (3,), 1),  # a retry
        ((1, 2, 3), (2, 4), 0),  # does not run up to the last clip
        ((1, 2, 3), (1, 2), 0),
        ((1, 1), (1, 1, 1), 2),
        ((1, None), (1, None, 2), 0),  # None: not known to be the same
        ((None, 2), (2, 3), 1),
    ],
)
def test_resent_clips(written, heard, known):
    assert Snapshot({}, written).resent(heard) == known


# --- dialogues ----------------------------------------------------------------------------------


def test_a_speaker_has_a_state_and_unknown_speakers_share_one():
    store = new_store()
    shared, mine = snapshot(store, 1.0, None), snapshot(store, 2.0, "A")
    store.commit({"a": Snapshot({**shared.states, **mine.states}, (1,))})
    assert equal(dialogue_of(store, "a").state, shared.states[None])
    assert equal(dialogue_of(store, "a", "A").state, mine.states["A"])
    assert equal(dialogue_of(store, "a", "B").state, store.initial_state(1))
    both = dialogue_of(store, ["a", "new"], ["A", None])
    assert both.turns == [1, 0]
    assert equal(both.state, MemoryState.cat([mine.states["A"], store.initial_state(1)]))


@pytest.mark.parametrize(
    ("ids", "speaker", "match"),
    [
        (["a", "b", "a"], None, "repeated id"),
        ([], None, "ids is"),
        (["a", 3], None, "ids is"),
        (["a", "b"], ["A"], "speaker is .* for 2 dialogues"),
        (["a"], [3], "speaker is"),
    ],
)
def test_bad_ids_and_speakers(ids, speaker, match):
    with pytest.raises(ArgumentError, match=match):
        dialogue_of(new_store(), ids, speaker)


# --- files ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    store = new_store()
    store.commit({"a": snapshot(store, 1.0, None, "A", clips=[2**63 - 1, None, -5])})
    store.commit({"b": snapshot(store, 2.0, None), "é": EMPTY})
    path = tmp_path / "calls.safetensors"
    store.save(path)
    return store, path


def test_save_and_load(saved):
    store, path = saved
    other = new_store()
    other.commit({"b": snapshot(other, 9.0), "c": snapshot(other, 9.0)})
    assert other.load(path) == ["a", "b", "é"]
    assert sorted(other) == ["a", "b", "c", "é"]
    for name in ("a", "b", "é"):
        mine, theirs = store.latest(name), other.latest(name)
        assert mine.clips == theirs.clips
        assert list(mine.states) == list(theirs.states)
        assert all(equal(mine.states[who], theirs.states[who]) for who in mine.states)


def test_save_some_and_none(saved, tmp_path):
    store, _ = saved
    store.save(tmp_path / "b", ["b"])
    assert new_store().load(tmp_path / "b") == ["b"]
    new_store().save(tmp_path / "empty")
    assert new_store().load(tmp_path / "empty") == []
    with pytest.raises(ArgumentError, match=r"\['nobody'\] are not known"):
        store.save(tmp_path / "x", ["b", "nobody"])
    assert not (tmp_path / "x").exists()


def test_a_failing_save_leaves_the_old_file(saved, monkeypatch):
    store, path = saved
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match=r"cannot write .*no space"):
        store.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_where_nothing_can_be_written(saved, tmp_path):
    store, path = saved
    for target in (tmp_path, tmp_path / "no" / "folder", "nul\0l", path / "below a file"):
        with pytest.raises(StoreError, match="cannot write"):
            store.save(target)


@pytest.mark.parametrize(
    ("field", "value"), [("heads", 1), ("site", 3), ("activation", "relu"), ("hidden_size", 16)]
)
def test_states_of_another_configuration(saved, field, value):
    _, path = saved
    other = new_store(replace(CONFIG, **{field: value}))
    with pytest.raises(CheckpointError, match=f"{field} is .* there and {value!r} here"):
        other.load(path)
    assert len(other) == 0


def rewrite(path, change) -> None:
    """Saves the file again, with a right checksum, after ``change(tensors, header)``."""
    tensors = load_file(path)
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    header = json.loads(metadata["mal_kernels"])
    header["checksum"] = UNSIGNED
    change(tensors, header)
    save_file(tensors, path, metadata={**metadata, "mal_kernels": json.dumps(header)})
    blob = path.read_bytes()
    checksum = hashlib.sha256(blob).hexdigest()
    path.write_bytes(blob.replace(UNSIGNED.encode(), checksum.encode(), 1))


def drop(tensors, header):
    del tensors["momentum.0"]


def add(tensors, header):
    tensors["weights.7"] = torch.zeros(1)


def fewer_rows(tensors, header):
    tensors["weights.1"] = tensors["weights.1"][:-1].clone()


def half(tensors, header):
    tensors["weights.0"] = tensors["weights.0"].half()


def not_finite(tensors, header):
    tensors["weights.0"][0, 0, 0, 0] = float("nan")


def newer(tensors, header):
    header["version"] = 99


def no_version(tensors, header):
    header["version"] = True


def no_checksum(tensors, header):
    del header["checksum"]


def wrong_checksum(tensors, header):
    header["checksum"] = "1" * 64


def odd_checksum(tensors, header):
    header["checksum"] = "é" * 64


def twice_the_same(tensors, header):
    header["dialogues"][1]["id"] = "a"


def speaker_twice(tensors, header):
    header["dialogues"][0]["speakers"] = ["A", "A"]


def a_million_speakers(tensors, header):
    header["dialogues"].append({"id": "x", "speakers": [*map(str, range(10**6))], "clips": []})


def adapter_file(tensors, header):
    header["kind"] = "adapter"


def no_list(tensors, header):
    header["dialogues"] = {"a": 1}


def bad_speaker(tensors, header):
    header["dialogues"][0]["speakers"] = [1]


def bad_clip(tensors, header):
    header["dialogues"][0]["clips"] = ["x"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop, r"momentum.0 is missing"),
        (add, r"weights.7 is not expected"),
        (fewer_rows, r"weights.1 is float32 \[2, 2, 8, 4\], expected float32 \[3, 2, 8, 4\]"),
        (half, r"weights.0 is float16"),
        (not_finite, r"weights.0 has values that are not finite"),
        (newer, r"newer mal_kernels \(format 99; this one reads up to 2\)"),
        (no_version, r"not 'dialogues' written by"),
        (adapter_file, r"not 'dialogues' written by"),
        (no_checksum, r"checksum of .* does not match"),
        (wrong_checksum, r"checksum of .* does not match"),
        (odd_checksum, r"checksum of .* does not match"),
        (twice_the_same, r"list of dialogues .* damaged"),
        (speaker_twice, r"list of dialogues .* damaged"),
        (a_million_speakers, r"weights.0 is .*, expected float32 \[1000003, 2, 4, 8\]"),
        (no_list, r"list of dialogues .* damaged"),
        (bad_speaker, r"list of dialogues .* damaged"),
        (bad_clip, r"list of dialogues .* damaged"),
    ],
)
def test_damaged_contents(saved, change, match):
    store, path = saved
    rewrite(path, change)
    before = {name: store.latest(name) for name in store}
    with pytest.raises(CheckpointError, match=match):
        store.load(path)
    assert {name: store.latest(name) for name in store} == before


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(saved, keep):
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cannot read .*calls.safetensors"):
        new_store().load(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(CheckpointError, match="cannot read"):
        new_store().load(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        new_store().load(tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="expected an object written by mal_kernels"):
        new_store().load(path)
    save_file({"weight": torch.zeros(2)}, path, metadata={"mal_kernels": "not json"})
    with pytest.raises(CheckpointError, match="is not JSON"):
        new_store().load(path)
    path.write_bytes(b"\x80\x04K*.")  # a pickle
    with pytest.raises(CheckpointError, match="cannot read"):
        new_store().load(path)
