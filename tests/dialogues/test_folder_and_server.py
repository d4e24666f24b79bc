"""A folder that others can reach or a kill leaves, and a Redis whose calls are interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time
from functools import partial

import pytest

from mal_kernels.dialogues.expiry import Expiry
from mal_kernels.dialogues.files import PartialFile
from mal_kernels.errors import ArgumentError, StoreError
from mal_kernels.store import Change, DirectoryStore, RedisStore
from tests.reliability.soak import forked
from tests.support.dialogues import new_store, snapshot
from tests.support.interrupts import interrupted_at

# --- a folder -------------------------------------------------------------------------------------


def test_a_folder_open_to_others_is_refused_or_warned_of(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(StoreError, match=r"anybody may write .*chmod 700"):
        DirectoryStore(tmp_path)
    tmp_path.chmod(0o755)
    with pytest.warns(UserWarning, match=r"others may look into .*chmod 700"):
        DirectoryStore(tmp_path)


def test_saved_dialogues_are_for_their_owner_only(tmp_path):
    store = new_store()
    store.commit({"a": snapshot(store, 1.0)})
    store.save(tmp_path / "calls")
    assert stat.S_IMODE((tmp_path / "calls").stat().st_mode) == 0o600


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_a_killed_process_was_writing_goes_with_the_next_that_opens_the_folder(tmp_path):
    store = DirectoryStore(tmp_path)

    def die_writing():
        partial = PartialFile(store.file("a"), 0o600)
        partial.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(forked(die_writing), 0)
    assert len(list(tmp_path.iterdir())) == 1
    alive = PartialFile(store.file("b"), 0o600)
    DirectoryStore(tmp_path)
    assert list(tmp_path.iterdir()) == [alive.path]  # its process is still at it
    alive.discard()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("renamed", [0, 1])
def test_a_batch_is_whole_after_a_kill_between_its_files(tmp_path, renamed):
    store = DirectoryStore(tmp_path)

    def die_in_the_middle():
        def die(self):
            if (self.path / ".batch").exists():  # it has begun
                for partial in sorted(self.path.glob(".*.safetensors.*"))[:renamed]:
                    partial.replace(self.path / partial.name[1:].rpartition(".")[0])
                os.kill(os.getpid(), signal.SIGKILL)

        DirectoryStore._finish_batch = die
        store.swap({"a": Change("", b"1"), "b": Change("", b"2")})

    status = os.waitpid(forked(die_in_the_middle), 0)[1]
    assert os.WIFSIGNALED(status)
    assert (store.get("a"), store.get("b")) == (b"1", b"2")
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_fills_up_in_a_write_leaves_the_value_before(tmp_path):
    resource = pytest.importorskip("resource")
    store = DirectoryStore(tmp_path)
    store.put("a", b"before")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError, match="cannot write"):
            store.put("a", bytes(3000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert store.get("a") == b"before"
    assert list(tmp_path.iterdir()) == [store.file("a")]


@pytest.mark.parametrize("name", ["get", "revision", "delete"])
def test_a_folder_that_cannot_be_looked_into_is_a_store_error(tmp_path, monkeypatch, name):
    store = DirectoryStore(tmp_path)

    def refused(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refused)  # also as root, who may look into everything
    with pytest.raises(StoreError, match="Permission denied"):
        getattr(store, name)("a")


def test_old_tombstones_go(tmp_path):
    store = DirectoryStore(tmp_path)
    store.delete("a")
    (tombstone,) = tmp_path.iterdir()
    DirectoryStore(tmp_path)
    assert tombstone.exists()
    os.utime(tombstone, (0, 0))
    DirectoryStore(tmp_path)
    assert not tombstone.exists()


# --- the thread that looks after caches -----------------------------------------------------------


class Looked:
    """Something that is watched; ``times`` it was looked after."""

    times = 0

    def expire(self) -> float:
        self.times += 1
        return 0.01


# of what a turn calls there, and of what that calls
WATCHED = ("mal_kernels/", "threading.py", "queue.py", "weakref.py")


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupt_anywhere_in_a_call_of_the_thread_does_not_stop_it(begun):
    instruction = 1
    while True:
        expiry, first, second = Expiry(), Looked(), Looked()
        if begun:
            expiry.watch(first)
        went_on = interrupted_at(instruction, partial(expiry.watch, second), WATCHED, "opcode")
        caller = threading.Thread(target=expiry.watch, args=(second,), daemon=True)
        caller.start()
        caller.join(30)
        assert not caller.is_alive(), instruction
        end = time.monotonic() + 30
        while not second.times and time.monotonic() < end:
            time.sleep(0.001)
        assert second.times, instruction
        if not went_on:
            break
        instruction += 1
    assert instruction > 20


# --- Redis ----------------------------------------------------------------------------------------


def test_an_interrupt_in_a_call_does_not_give_the_next_one_its_answer(redis_url, monkeypatch):
    from redis.connection import AbstractConnection

    store = RedisStore(redis_url, prefix="interrupted:")
    for name in "ab":
        store.put(name, name.encode())
    real = AbstractConnection.send_packed_command

    def interrupted(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise KeyboardInterrupt

    for call in (lambda: store.get("a"), lambda: store.revision("a"), lambda: store.put("c", b"c")):
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(AbstractConnection, "send_packed_command", interrupted)
            call()
        assert [store.get(name) for name in "bab"] == [b"b", b"a", b"b"]


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://:s3cret@127.0.0.1:port/0", {}),
        ("redis://me:s3cret@127.0.0.1:1/0?socket_timeout=x", {}),
        ("redis://:s3cret@127.0.0.1:1/0", {"no_such_option": 1}),
    ],
)
def test_bad_options_are_refused_without_telling_the_password(url, options):
    pytest.importorskip("redis")
    with pytest.raises(ArgumentError, match="url is") as caught:
        RedisStore(url, **options)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
