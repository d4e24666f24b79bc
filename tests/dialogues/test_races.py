"""Several processes and threads on one dialogue: the store decides, and what is erased stays so."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from mal_kernels.dialogues import server
from mal_kernels.dialogues.snapshot import EMPTY
from mal_kernels.errors import ArgumentError, CheckpointError, StoreError
from mal_kernels.store import Change, DirectoryStore, MemoryStore, RedisStore, SharedStore
from tests.reliability.echo import echo_adapter, turn_tokens
from tests.reliability.soak import forked
from tests.support.dialogues import equal, new_store, snapshot


@pytest.fixture(params=["directory", "redis"])
def make(request, tmp_path):
    """What makes the same store again, as another process does."""
    if request.param == "directory":
        return partial(DirectoryStore, tmp_path / "calls")
    return partial(RedisStore, request.getfixturevalue("redis_url"), prefix=f"{tmp_path}:")


# --- what a store decides -------------------------------------------------------------------------


def test_a_revision_tells_apart_all_that_was_there(make):
    store, seen = make(), set()
    assert isinstance(store, SharedStore)
    assert store.revision("a") == ""
    for value in (b"one", b"two", None, b"one!", None, None):
        store.delete("a") if value is None else store.put("a", value)
        assert make().revision("a") not in seen
        seen.add(store.revision("a"))
    assert store.get("a") is None


def test_a_swap_is_of_all_or_of_none(make):
    store = make()
    store.put("a", b"old")
    old = store.revision("a")
    assert store.swap({"a": Change("", b"x"), "b": Change("", b"y")}) == ["a"]
    assert (store.get("a"), store.get("b")) == (b"old", None)
    both = {"a": Change(old, b"x"), "b": Change("", b"y")}
    assert store.swap(both) == []
    assert (store.get("a"), store.get("b")) == (b"x", b"y")
    assert store.swap(both) == []  # again, as after an answer that was lost
    store.delete("a")
    assert store.swap({"a": Change(old, b"x")}) == ["a"]
    assert store.swap({"a": Change("", b"x")}) == ["a"]  # a first turn that began before
    assert store.get("a") is None
    assert store.swap({"a": Change(store.revision("a"), b"new")}) == []


def test_a_revision_of_a_dialogue_is_read_without_its_state(tmp_path, monkeypatch):
    backing = DirectoryStore(tmp_path)
    store = new_store(backing=backing)
    store.commit({"a": snapshot(store, 1.0)})
    monkeypatch.setattr(backing, "get", None)
    assert store.latest("a").states
    assert backing.revision("a") == store.latest("a").revision
    assert len(backing.revision("a")) == 64


# --- erased is erased -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "memory", "shared"])
@pytest.mark.parametrize("turns", [0, 1])
def test_a_turn_in_which_its_dialogue_is_forgotten_is_not_written(make, kind, turns):
    backing = {"none": lambda: None, "memory": MemoryStore, "shared": make}[kind]()
    host, mal = echo_adapter(backing)
    for turn in range(turns):
        with mal.dialogue("a"):
            host(inputs_embeds=turn_tokens(0, turn))
    other = echo_adapter(backing if kind == "memory" else make())[1] if backing else mal
    host.between = lambda: other.dialogues.forget(["a"])
    with pytest.raises(StoreError, match="changed or forgotten"), mal.dialogue("a"):
        host(inputs_embeds=turn_tokens(0, turns))
    host.between = lambda: None
    assert "a" not in mal.dialogues
    with mal.dialogue("a") as dialogue:
        host(inputs_embeds=turn_tokens(0, turns))
        assert dialogue.turns == [1]


def test_a_rollback_does_not_bring_back_what_was_erased_meanwhile():
    class FailsOnce(MemoryStore):
        between = None

        def put(self, key, value):
            if key == "b" and self.between:
                between, self.between = self.between, None
                between()
                raise StoreError("disk full")
            super().put(key, value)

    backing = FailsOnce()
    store = new_store(backing=backing)
    store.commit({name: snapshot(store, 1.0) for name in "ab"})
    backing.between = lambda: backing.values.pop("a")  # as another process does
    with pytest.raises(StoreError, match="disk full"):
        store.commit({name: snapshot(store, 2.0) for name in "ab"})
    assert backing.values.keys() == {"b"}


def test_a_read_under_way_does_not_bring_back_what_was_forgotten():
    class Waits(MemoryStore):
        between = staticmethod(lambda: None)

        def get(self, key):
            value = super().get(key)
            between, self.between = self.between, lambda: None
            between()
            return value

    backing = Waits()
    store = new_store(backing=backing)
    store.commit({"a": snapshot(store, 1.0)})
    with store._lock:
        store._histories.clear()
    backing.between = lambda: store.forget(["a"])
    store.latest("a")
    assert len(store) == 0


def test_forgetting_between_the_write_and_the_rename_of_a_turn_waits_and_erases(
    tmp_path, monkeypatch
):
    one, other = (new_store(backing=DirectoryStore(tmp_path)) for _ in range(2))
    one.commit({"a": snapshot(one, 1.0)})
    real, forgets = Path.replace, list[threading.Thread]()

    def replace(self, target):
        if not forgets:
            forgets.append(threading.Thread(target=other.forget, args=(["a"],)))
            forgets[0].start()
            time.sleep(0.05)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    one.commit({"a": snapshot(one, 2.0)})
    forgets[0].join()
    assert DirectoryStore(tmp_path).get("a") is None
    assert one.latest("a").clips == ()


# --- written, but nobody was told -----------------------------------------------------------------


class Unheard:
    """Another store, whose next ``swap`` is interrupted after it was done."""

    def __init__(self, store):
        self.store, self.error = store, None
        self.get, self.put, self.delete = store.get, store.put, store.delete
        self.revision = store.revision

    def swap(self, changes):
        changed, error, self.error = self.store.swap(changes), self.error, None
        if error:
            raise error
        return changed


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreError("the answer was lost")])
def test_a_turn_that_was_written_unheard_is_as_if_it_had_been_heard(make, error):
    backing = Unheard(make())
    (_host, mal), (_other, undisturbed) = echo_adapter(backing), echo_adapter()

    @torch.no_grad()
    def answer(adapter, turn):
        return adapter.dialogue("a", turn_id=str(turn))(inputs_embeds=turn_tokens(0, turn))

    for turn in range(3):
        if turn != 1:
            backing.error = error
            with pytest.raises(type(error)):
                answer(mal, turn)
        assert torch.equal(answer(mal, turn), answer(undisturbed, turn))
    assert len(mal.dialogues.latest("a").clips) == 3
    for turns in (2, 1, 0):
        mal.dialogues.undo(["a"])
        assert len(mal.dialogues.latest("a").clips) == turns


def test_what_was_written_unheard_is_forgotten_like_the_rest(make):
    backing = Unheard(make())
    store = new_store(backing=backing, cache_seconds=0.2)
    for ends in (lambda: store.forget(["a"]), lambda: (time.sleep(0.3), store.expire())):
        backing.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            store.commit({"a": snapshot(store, 1.0)})
        assert store._unconfirmed._writes
        ends()
        assert not store._unconfirmed._writes


def play_until_done(make, worker: int, turns: int) -> None:
    host, mal = echo_adapter(make())
    for turn in range(turns):
        while True:
            with contextlib.suppress(StoreError), torch.no_grad(), mal.dialogue("a"):
                host(inputs_embeds=turn_tokens(worker + 1, turn))
                break
            time.sleep(0.002 * (1 + worker))  # not all again at the same time


def lost_turns(make, workers: int, turns: int) -> int:
    """Turns that ended without an error and are not in the store."""
    children = [forked(partial(play_until_done, make, i, turns)) for i in range(workers)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * workers
    return workers * turns - len(echo_adapter(make())[1].dialogues.latest("a").clips)


def play_names(make, rounds: int, begun: int) -> None:
    host, mal = echo_adapter(make())
    host.between = lambda: os.write(begun, b"x")
    for i in range(rounds):
        with contextlib.suppress(StoreError), torch.no_grad(), mal.dialogue(f"gone-{i}"):
            host(inputs_embeds=turn_tokens(0, i))


def come_back(make, rounds: int) -> int:
    """Dialogues that are in the store after they were erased while their first turn ran."""
    reads, writes = os.pipe()
    child = forked(partial(play_names, make, rounds, writes))
    os.close(writes)
    mal = echo_adapter(make())[1]
    for i in range(rounds):
        assert os.read(reads, 1)  # the turn has begun
        time.sleep(0.0002 * (i % 12))
        mal.dialogues.forget([f"gone-{i}"])
    assert os.waitpid(child, 0)[1] == 0
    os.close(reads)
    return sum(make().get(f"gone-{i}") is not None for i in range(rounds))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("turns", "erasures"), [(6, 20), pytest.param(250, 500, marks=pytest.mark.slow)]
)
def test_four_processes_lose_no_turn_and_nothing_erased_comes_back(make, turns, erasures):
    echo_adapter()  # what torch loads once
    assert lost_turns(make, 4, turns) == 0
    assert come_back(make, erasures) == 0


# --- one process ----------------------------------------------------------------------------------


def test_a_store_of_three_methods_works_and_says_for_what():
    class Three:
        def __init__(self):
            self.inner = MemoryStore()
            self.get, self.put, self.delete = self.inner.get, self.inner.put, self.inner.delete

    with pytest.warns(UserWarning, match="Three has get, put and delete .* one process"):
        store = new_store(backing=Three())
    store.commit({"a": snapshot(store, 1.0)})
    past = store.latest("a")
    store.commit({"a": snapshot(store, 2.0)}, {"a": past})
    with pytest.raises(StoreError, match="changed or forgotten"):
        store.commit({"a": snapshot(store, 3.0)}, {"a": past})
    store.forget(["a"])
    with pytest.raises(StoreError, match="changed or forgotten"):
        store.commit({"a": snapshot(store, 3.0)}, {"a": EMPTY})


def test_a_slow_write_of_one_dialogue_does_not_stop_another():
    class Slow(MemoryStore):
        def put(self, key, value):
            if key == "slow":
                begun.set()
                go_on.wait(30)
            super().put(key, value)

    begun, go_on = threading.Event(), threading.Event()
    store = new_store(backing=Slow())
    thread = threading.Thread(target=store.commit, args=({"slow": snapshot(store, 1.0)},))
    thread.start()
    assert begun.wait(30)
    store.commit({"other": snapshot(store, 1.0)})
    assert store.latest("other").states
    assert thread.is_alive()
    go_on.set()
    thread.join()
    assert store.latest("slow").states


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_a_thread_is_inside_does_not_hang_the_child():
    store = new_store(backing=MemoryStore())
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with store._lock:
            inside.set()
            go_on.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    child = forked(lambda: store.commit({"a": snapshot(store, 1.0)}))
    end = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    go_on.set()
    thread.join()
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_turns_of_one_dialogue_queue():
    store, order = new_store(), []

    def later():
        with store.queue(["a", "b"], wait=30):
            order.append("second")

    with store.queue(["b"], wait=0):
        thread = threading.Thread(target=later)
        thread.start()
        with pytest.raises(StoreError, match="has not ended in 0 seconds"), store.queue(["b"], 0):
            pass
        with store.queue(["c"], wait=0):  # others do not wait
            order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_turns_of_two_processes_queue_and_the_queue_of_a_killed_one_ends(make, monkeypatch):
    monkeypatch.setattr(server, "LEASE_SECONDS", 2.0)
    store = new_store(backing=make())
    reads, writes = os.pipe()

    def hold():
        with new_store(backing=make()).queue(["a", "b"], wait=0):
            os.write(writes, b"x")
            time.sleep(60)

    child = forked(hold)
    assert os.read(reads, 1)
    for _ in range(4):  # longer than a lease, which is renewed
        with pytest.raises(StoreError, match="has not ended in 0"), store.queue(["b"], 0.8):
            pass
    with store.queue(["c"], wait=0):  # others do not wait
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for _ in range(2):  # it is free again after a turn
        with store.queue(["a", "b"], wait=60):
            pass


def play_in_turn(make, worker: int, turns: int) -> None:
    _host, mal = echo_adapter(make())
    for turn in range(turns):
        mal.dialogue("a", wait=100)(inputs_embeds=turn_tokens(worker + 1, turn))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_of_turns_that_queue_between_processes_none_is_refused(make):
    echo_adapter()
    children = [forked(partial(play_in_turn, make, i, 5)) for i in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(echo_adapter(make())[1].dialogues.latest("a").clips) == 10


def test_undo_of_a_batch_is_of_all_or_of_none():
    store = new_store(backing=MemoryStore())
    store.commit({name: snapshot(store, 1.0, clips=[1]) for name in "ab"})
    with store._lock:
        store._histories.pop("b")  # evicted
    with pytest.raises(ArgumentError, match=r"\['b'\] have no turn left"):
        store.undo(["a", "b"])
    assert [store.latest(name).clips for name in "ab"] == [(1,), (1,)]


# --- kept no longer than said ---------------------------------------------------------------------


def test_memory_drops_what_is_not_used_and_the_backing_has():
    store, plain = new_store(backing=MemoryStore(), cache_seconds=0.3), new_store()
    for x in (store, plain):
        x.commit({"a": snapshot(x, 1.0)})
    end = time.monotonic() + 20
    while len(store) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(store) == 0
    assert store.latest("a").states
    plain.expire()
    assert len(plain) == 1  # nobody else has it


def test_a_dialogue_that_the_server_lost_is_not_a_new_one(make):
    store, backing = new_store(backing=make()), make()
    store.commit({"a": snapshot(store, 1.0)})
    if isinstance(backing, DirectoryStore):
        backing.file("a").unlink()
    else:
        backing._redis.delete(backing._name("a"))
    with pytest.raises(StoreError, match="evicted or lost it"):
        store.latest("a")
    store.forget(["a"])
    assert store.latest("a").clips == ()


# --- whose states ---------------------------------------------------------------------------------


def test_states_of_other_weights_are_refused(make):
    host, mal = echo_adapter(make())
    with mal.dialogue("a"):
        host(inputs_embeds=turn_tokens(0, 0))
    same = echo_adapter(make())[1]
    assert equal(same.dialogues.latest("a").states[None], mal.dialogues.latest("a").states[None])
    trained = echo_adapter(make())[1]
    with torch.no_grad():
        trained.memory.to_k.weight[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match=r"that other weights wrote .* forget the"):
        trained.dialogues.latest("a")
    trained.dialogues.forget(["a"])
    assert trained.dialogues.latest("a").clips == ()
    assert echo_adapter()[1].double().dialogues.weights() == mal.dialogues.weights()


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("undo_depth", -1), ("undo_depth", "8"), ("max_bytes", "1GB"), ("max_dialogues", 2.5)),
        *(("cache_seconds", 0), ("cache_seconds", 1e9), ("backing", "redis://x")),
    ],
)
def test_options_are_checked_where_they_are_set(name, value):
    store = new_store()
    with pytest.raises(ArgumentError, match=f"{name} is {value!r}"):
        setattr(store, name, value)
    with warnings.catch_warnings(), pytest.raises(ArgumentError):
        new_store(**{name: value})
