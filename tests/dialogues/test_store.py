"""Stores behind the dialogues: bytes kept and erased, eviction, restart, other processes, Redis."""

from __future__ import annotations

import copy
import stat
import time
from pathlib import Path

import pytest
import torch

from mal_kernels import MALAdapter, MALConfig
from mal_kernels.dialogues.snapshot import EMPTY, Snapshot
from mal_kernels.errors import ArgumentError, CheckpointError, StoreError
from mal_kernels.store import DirectoryStore, KeyValueStore, MemoryStore, RedisStore
from tests.support.dialogues import CONFIG, dialogue_of, equal, new_store, snapshot

GOLDEN = Path(__file__).parents[1] / "golden"
KEYS = ("call-17", "", "../../etc/passwd", "/", "a" * 1000, "nul\0l", "é", "\ud800", ".", "C:\\x:y")


@pytest.fixture(params=["memory", "directory", "redis"])
def backing(request, tmp_path) -> KeyValueStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "directory":
        return DirectoryStore(tmp_path / "calls")
    return RedisStore(request.getfixturevalue("redis_url"), prefix=f"{tmp_path}:")


# --- bytes ----------------------------------------------------------------------------------


def test_bytes_come_back_and_go(backing):
    assert isinstance(backing, KeyValueStore)
    for i, key in enumerate(KEYS):
        assert backing.get(key) is None
        backing.put(key, b"first")
        backing.put(key, bytes(range(256)) * i)
    for i, key in enumerate(KEYS):
        assert backing.get(key) == bytes(range(256)) * i
    for key in KEYS:
        backing.delete(key)
        backing.delete(key)
        assert backing.get(key) is None


def test_a_folder_holds_nothing_but_its_files(tmp_path):
    store = DirectoryStore(tmp_path / "in" / "calls")
    for key in KEYS:
        store.put(key, b"x")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(KEYS)
    assert {path.parent for path in files} == {store.path}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700


def test_delete_also_takes_what_a_killed_process_left(tmp_path):
    store = DirectoryStore(tmp_path)
    store.put("a", b"x")
    store.put("b", b"x")
    (tmp_path / f".{store.file('a').name}.123.456").write_bytes(b"half")
    store.delete("a")
    left = set(tmp_path.iterdir()) - {store.file("b")}
    assert [path.name for path in left] == [store.file("a").with_suffix(".erased").name]
    assert [path.read_bytes() for path in left] == [b""]


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "nul\0l"):
        with pytest.raises(StoreError, match="cannot make the folder"):
            DirectoryStore(path)
    store = DirectoryStore(tmp_path / "calls")
    store.file("a").mkdir()
    for use in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: store.delete("a")):
        with pytest.raises(StoreError, match=r"cannot (read|write|erase)"):
            use()


def test_redis_that_is_not_there():
    pytest.importorskip("redis")
    store = RedisStore("redis://127.0.0.1:1/0")
    for use in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: store.delete("a")):
        with pytest.raises(StoreError, match="Redis refused"):
            use()
    with pytest.raises(ArgumentError, match="url is 'http://x'"):
        RedisStore("http://x")
    with pytest.raises(ArgumentError, match="ttl is 0"):
        RedisStore("redis://127.0.0.1:1/0", ttl=0)


def test_redis_erases_after_ttl(redis_url):
    store = RedisStore(redis_url, prefix="ttl:", ttl=1)
    store.put("a", b"x")
    assert store.get("a") == b"x"
    time.sleep(1.1)
    assert store.get("a") is None


# --- dialogues ------------------------------------------------------------------------------


def random_snapshot(store, *who, clips=()):
    state = store.initial_state(1).detach()
    return Snapshot({w: state.map(torch.randn_like) for w in who}, tuple(clips))


def test_what_is_evicted_comes_back_bit_for_bit(backing):
    store = new_store(backing=backing, max_dialogues=3)
    turns = {f"{i}": random_snapshot(store, None, "A", clips=[i, None]) for i in range(10)}
    for name, turn in turns.items():
        store.commit({name: turn})
        assert len(store) <= 3
    again = new_store(backing=backing)  # as after a restart
    for name, turn in turns.items():
        for where in (store, again):
            found = where.latest(name)
            assert found.clips == turn.clips
            assert list(found.states) == [None, "A"]
            assert all(equal(found.states[who], turn.states[who]) for who in turn.states)
    assert len(store) == 3
    assert len(again) == 10


def test_memory_is_bounded_by_bytes_with_undo():
    one = new_store().initial_state(1).nbytes
    store = new_store(max_bytes=10 * one)
    for i in range(5):
        for name in "ab":
            store.commit({name: snapshot(store, i)})
    assert list(store) == ["a", "b"]  # with five snapshots each
    store.commit({"b": snapshot(store, 5)})
    assert list(store) == ["b"]
    store.commit({"c": snapshot(store, 0)})
    assert list(store) == ["b", "c"]
    store.commit({name: snapshot(store, 1) for name in "defghijklmnop"})
    assert list(store) == list("defghijklmnop")  # a turn is never lost at once
    silent = store.latest("d")
    for _ in range(3):
        store.commit({"d": silent._replace(clips=())})
    assert store._histories["d"].nbytes == silent.nbytes  # the same state is counted once


def test_reading_keeps_a_dialogue_in_memory():
    store = new_store(max_dialogues=2)
    for name in "abac":
        store.commit({name: snapshot(store, 1)})
    store.latest("a")
    store.commit({"d": snapshot(store, 1)})
    assert list(store) == ["a", "d"]


def test_forget_erases_the_backing_too(backing):
    store, other = new_store(backing=backing), new_store(backing=backing)
    store.commit({"a": snapshot(store, 1.0), "b": snapshot(store, 1.0)})
    assert "a" in other
    store.forget(["a"])
    assert backing.get("a") is None
    assert "a" not in store
    assert "a" not in other  # not even in the memory of another process
    assert other.latest("a")[:2] == EMPTY[:2]
    assert "b" in other
    with pytest.raises(ArgumentError, match="cannot list"):
        store.forget()
    with pytest.raises(ArgumentError, match="cannot list"):
        store.save("nowhere")


def test_a_store_that_cannot_erase_is_not_silent():
    class Stubborn(MemoryStore):
        def delete(self, key):
            raise OSError("read-only")

    store = new_store(backing=Stubborn())
    store.commit({"a": snapshot(store, 1.0), "b": snapshot(store, 1.0)})
    with pytest.raises(StoreError, match=r"\['a', 'b'\] may still be .*read-only"):
        store.forget(["a", "b"])


def test_undo_reaches_the_backing(backing):
    store, other = new_store(backing=backing), new_store(backing=backing)
    first, second = snapshot(store, 1.0, clips=[1]), snapshot(store, 2.0, clips=[1, 2])
    store.commit({"a": first})
    store.commit({"a": second})
    assert other.latest("a").clips == (1, 2)
    store.undo(["a"])
    assert other.latest("a").clips == (1,)
    assert equal(other.latest("a").states[None], first.states[None])
    with pytest.raises(ArgumentError, match="since they were loaded"):
        other.undo(["a"])
    store.undo(["a"])
    assert other.latest("a").clips == ()
    assert not other.latest("a").states


def test_any_process_takes_any_turn(backing):
    workers = [new_store(backing=backing) for _ in range(3)]
    turn = EMPTY
    for i in range(9):
        worker = workers[i % 3]
        now = worker.latest("a")
        assert now.clips == turn.clips
        turn = snapshot(worker, float(i), clips=range(i + 1))
        worker.commit({"a": turn}, {"a": now})
    assert all(equal(w.latest("a").states[None], turn.states[None]) for w in workers)


def test_a_turn_on_what_another_has_changed_is_refused(backing):
    one, two = new_store(backing=backing), new_store(backing=backing)
    past = one.latest("a"), two.latest("a")
    one.commit({"a": snapshot(one, 1.0, clips=[1])}, {"a": past[0]})
    with pytest.raises(StoreError, match=r"\['a'\] were changed or forgotten"):
        two.commit({"a": snapshot(two, 2.0), "b": snapshot(two, 2.0)}, {"a": past[1], "b": EMPTY})
    assert two.latest("a").clips == (1,)
    assert "b" not in two
    now = two.latest("a")
    one.forget(["a"])
    with pytest.raises(StoreError, match="changed or forgotten"):
        two.commit({"a": snapshot(two, 3.0)}, {"a": now})
    assert backing.get("a") is None


def test_a_dialogue_put_before_there_was_a_backing_moves_there_with_its_next_turn(tmp_path):
    store = new_store()
    store.commit({"a": snapshot(store, 1.0, clips=[1])})
    store.backing = DirectoryStore(tmp_path)
    now = store.latest("a")
    assert now.clips == (1,)
    store.commit({"a": snapshot(store, 2.0, clips=[1, 2])}, {"a": now})
    assert new_store(backing=DirectoryStore(tmp_path)).latest("a").clips == (1, 2)


def test_files_of_a_folder_are_files_of_save(tmp_path):
    store = new_store(backing=DirectoryStore(tmp_path / "calls"))
    store.commit({"a": snapshot(store, 1.0), "b": snapshot(store, 2.0)})
    assert new_store().load(store.backing.file("a")) == ["a"]
    store.save(tmp_path / "both", ["a", "b"])
    elsewhere = new_store(backing=DirectoryStore(tmp_path / "elsewhere"), max_dialogues=1)
    assert elsewhere.load(tmp_path / "both") == ["a", "b"]
    assert equal(elsewhere.latest("a").states[None], store.latest("a").states[None])


def test_damage_in_the_backing_is_found(tmp_path):
    backing = DirectoryStore(tmp_path)
    store = new_store(backing=backing)
    store.commit({"a": snapshot(store, 1.0), "b": snapshot(store, 2.0)})
    blob = backing.get("a")
    for damaged, match in (
        (blob[:-1] + bytes([blob[-1] ^ 1]), "checksum of dialogue 'a'"),
        (blob[:100], "cannot read dialogue 'a'"),
        (b"", "cannot read dialogue 'a'"),
        (backing.get("b"), r"that of \['b'\]"),
    ):
        backing.put("a", damaged)
        other = new_store(backing=backing)
        with pytest.raises(CheckpointError, match=match):
            other.latest("a")
        assert len(other) == 0
        assert other.latest("b").states


def test_an_adapter_can_be_copied():
    mal = MALAdapter(MALConfig(heads=2, head_dim=4, hidden_size=8))
    twin = copy.deepcopy(mal)
    twin.dialogues.commit({"a": snapshot(twin.dialogues, 1.0)})
    assert len(mal.dialogues) == 0
    assert twin.dialogues.initial_state(1).weights[0].shape == (1, 2, 4, 8)


# --- versions -------------------------------------------------------------------------------


def ramp(x: torch.Tensor, k: int) -> torch.Tensor:
    return (torch.arange(x.numel(), dtype=x.dtype) / 7 - k).reshape(x.shape)


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.glob("*.*.*")))
def test_files_of_earlier_versions_load(version):
    mal = MALAdapter.from_pretrained(GOLDEN / version)
    assert mal.config.lr_init == (0.1, 0.2)
    for k, parameter in enumerate(mal.parameters()):
        assert torch.equal(parameter, ramp(parameter, k))
    dialogues = mal.dialogues
    assert dialogues.load(GOLDEN / version / "dialogues.safetensors") == ["call-17", "é", "silent"]
    like = dialogues.initial_state(1).detach()
    for name, who, k in (("call-17", None, 1), ("call-17", "A", 2), ("é", None, 3)):
        state = dialogues.latest(name).states[who]
        assert equal(state, like.map(lambda x, k=k: ramp(x, k)))
    assert dialogues.latest("call-17").clips == (5, None, -3)
    assert dialogues.latest("é").clips == (2**63 - 1,)
    assert dialogues.latest("silent") == EMPTY


def test_ids_that_are_no_strings():
    for ids in (5, None, {"a": 1}, b"x", [b"x"]):
        with pytest.raises(ArgumentError, match="ids is"):
            dialogue_of(new_store(), ids)
    with pytest.raises(ArgumentError, match="speaker is 5"):
        dialogue_of(new_store(), "a", 5)
    assert CONFIG.hidden_size == 8
