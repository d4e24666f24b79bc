"""Turns that fail, threads that share an adapter, kill -9, memories that would explode."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from mal_kernels import MALAdapter, MALConfig
from mal_kernels.dialogues.expiry import EXPIRY
from mal_kernels.dialogues.unconfirmed import Unconfirmed
from mal_kernels.errors import ArgumentError, CheckpointError, StoreError
from mal_kernels.store import DirectoryStore, MemoryStore
from mal_kernels.testing import tiny_host, tiny_inputs
from tests.reliability.__main__ import drift
from tests.reliability.echo import echo_adapter, turn_tokens
from tests.reliability.heap import allocated_mib, resident_mib, trimmed_mib
from tests.reliability.interrupts import interrupts
from tests.reliability.soak import FailingStore, Log, compare, play, steady
from tests.support.dialogues import equal

ROOT = Path(__file__).parents[2]


def states(mal: MALAdapter, names) -> dict:
    return {name: dict(mal.dialogues.latest(name).states) for name in names}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys() and all(equal(a[name][w], b[name][w]) for w in a[name])
        for name in a
    )


# --- one turn ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit]
)
def test_a_turn_that_fails_in_the_host_leaves_the_last_one(error, tmp_path):
    host, mal = echo_adapter(DirectoryStore(tmp_path))
    play(host, mal, 0, 0)
    before, file = mal.dialogues.latest("call-0"), mal.dialogues.backing.get("call-0")

    def fail():
        raise error("in the host")

    host.between = fail
    with pytest.raises(error, match="in the host"):
        play(host, mal, 0, 1)
    assert mal.dialogues.latest("call-0") is before
    assert mal.dialogues.backing.get("call-0") == file
    host.between = lambda: None
    play(host, mal, 0, 1)
    _, undisturbed = echo_adapter()
    for turn in range(2):
        play(host_of(undisturbed), undisturbed, 0, turn)
    assert same(states(mal, ["call-0"]), states(undisturbed, ["call-0"]))


def host_of(mal: MALAdapter):
    return mal._attachment.host.model


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("error", [StoreError, KeyboardInterrupt])
def test_a_store_that_fails_in_the_middle_of_a_batch_takes_it_back(where, error):
    class Failing(MemoryStore):
        puts = 0

        def put(self, key, value):
            Failing.puts += 1
            fails = Failing.puts == 4  # the second of the second turn
            if fails and where == "before":
                raise error("disk")
            super().put(key, value)
            if fails:
                raise error("disk")

    host, mal = echo_adapter(Failing())
    names = ["a", "b"]

    def turn(i):
        with torch.no_grad(), mal.dialogue(names):
            host(inputs_embeds=torch.cat([turn_tokens(i, 0)[:, :4], turn_tokens(i, 1)[:, :4]]))

    turn(0)
    kept, memory = dict(mal.dialogues.backing.values), states(mal, names)
    with pytest.raises(error, match="disk"):
        turn(1)
    assert mal.dialogues.backing.values == kept
    assert same(states(mal, names), memory)
    turn(1)
    assert mal.dialogues.latest("a").clips != ()
    assert len(mal.dialogues.latest("b").clips) == 2


def test_a_turn_played_again_after_its_answer_was_lost_is_written_once(tmp_path):
    host, mal = echo_adapter(DirectoryStore(tmp_path))
    with mal.dialogue("a") as dialogue:
        host(inputs_embeds=turn_tokens(0, 0))
        once = dialogue.state
        host(inputs_embeds=turn_tokens(0, 0))
        assert dialogue.turns == [1]
        assert equal(dialogue.state, once)


def test_a_stop_by_the_user_ends_a_turn_and_an_exception_in_a_criterion_loses_it():
    host = tiny_host("qwen2_audio")
    mal = MALAdapter(MALConfig(heads=2, head_dim=4)).attach(host)

    class Stop(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            return torch.ones(len(ids), dtype=torch.bool)

    class Cancel(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            raise KeyboardInterrupt

    x = tiny_inputs(host, [[5]])
    with mal.dialogue("a") as dialogue:
        with pytest.raises(KeyboardInterrupt):
            host.generate(**x, stopping_criteria=StoppingCriteriaList([Cancel()]))
        assert dialogue.turns == [0]
        host.generate(**x, stopping_criteria=StoppingCriteriaList([Stop()]))
        assert dialogue.turns == [1]


def test_a_dialogue_forgotten_while_its_turn_runs_stays_forgotten(tmp_path):
    host, mal = echo_adapter(DirectoryStore(tmp_path))
    play(host, mal, 0, 0)
    host.between = lambda: mal.dialogues.forget(["call-0"])
    with pytest.raises(StoreError, match="changed or forgotten"):
        play(host, mal, 0, 1)
    assert not mal.dialogues.latest("call-0").states
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]  # a tombstone, for an hour


# --- kill -9 and all the rest at once -----------------------------------------------------------


def test_soak_with_kills_host_errors_store_errors_and_evictions():
    command = [sys.executable, "-m", "tests.reliability.soak", "--dialogues", "8", "--turns", "12"]
    done = subprocess.run([*command, "--lifetime", "40"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["states_that_differ"] == 0
    faults = result["faults"]
    assert faults["kill -9"] >= 3
    assert sum(n for name, n in faults.items() if name.startswith("host.")) >= 3
    assert sum(n for name, n in faults.items() if name.startswith("store.swap")) >= 3


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_interrupts_at_any_moment_of_turns_leave_nothing_and_change_no_answer(count, tmp_path):
    found = interrupts(count, tmp_path / "calls")
    assert found.pop("interrupts") == count
    assert found.pop("turns") > count // 50
    found.pop("swallowed_in_finalizers")  # where Python drops them, as in WeakSet's own
    assert not any(found.values()), found


def test_the_interrupts_would_notice(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.reliability.interrupts.TURNS", 4)
    monkeypatch.setattr(Unconfirmed, "found", lambda *_: False)  # no written turn is remembered
    real = DirectoryStore.swap

    def interrupted(self, changes):
        changed = real(self, changes)
        if not getattr(self, "done", False):
            self.done = True
            raise KeyboardInterrupt
        return changed

    monkeypatch.setattr(DirectoryStore, "swap", interrupted)
    found = interrupts(20, tmp_path / "calls")
    assert found["wrong_answers"] >= 1


def test_the_soak_would_notice(tmp_path):
    host, mal = echo_adapter(DirectoryStore(tmp_path))
    for dialogue in range(2):
        for turn in range(3):
            play(host, mal, dialogue, turn)
    assert compare(tmp_path, 2, 3) == 0
    mal.dialogues.undo(["call-1"])  # a lost turn
    assert compare(tmp_path, 2, 3) == 1
    with mal.dialogue("call-1", "A"):  # another one in its place
        host(inputs_embeds=turn_tokens(7, 7))
    assert compare(tmp_path, 2, 3) == 1
    file = mal.dialogues.backing.file("call-0")
    file.write_bytes(file.read_bytes()[:-1])  # a write that was not atomic
    with pytest.raises(CheckpointError, match="cannot read"):
        compare(tmp_path, 2, 3)


def test_the_failing_store_of_the_soak_fails(tmp_path):
    log = Log(tmp_path / "log")
    store = FailingStore(MemoryStore(), log, seed=0)
    failed = 0
    for i in range(200):
        try:
            store.put(str(i), b"x")
        except StoreError:
            failed += 1
    assert failed == len(log.read()) > 5
    assert 200 - failed < len(store.store.values) < 200  # some failed after the work was done


# --- memory ---------------------------------------------------------------------------------


def left_behind(mal, host, turns: Counter) -> Counter:
    """What is alive, by type, after some turns of six dialogues, half of which fail at first."""

    def fail():
        raise RuntimeError("planted")

    def turn(dialogue):
        host.between = fail
        with pytest.raises(RuntimeError, match="planted"):
            play(host, mal, dialogue, turns[dialogue])
        host.between = lambda: None
        play(host, mal, dialogue, turns[dialogue])
        turns[dialogue] += 1

    for _ in range(2):
        for dialogue in (0, 0, 0, 0, 1, 2, 3, 4, 0):
            turn(dialogue)
        with ThreadPoolExecutor(1) as pool:  # another thread every time
            pool.submit(turn, 5).result()
    mal.last_turn = None  # has as many tokens as were said
    gc.collect()
    alive = gc.get_objects()
    tensors = [x for x in alive if issubclass(type(x), torch.Tensor)]
    counts = Counter(type(x).__name__ for x in alive if type(x) is not Counter)
    counts["bytes of tensors"] = sum(x.nbytes for x in tensors if x.device.type == "cpu")
    return counts


@pytest.fixture
def nothing_yet():
    """What other tests have left alive is not counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_yet")
@pytest.mark.parametrize("leak", [False, True])
def test_turns_leave_nothing_behind(tmp_path, leak, monkeypatch):
    # the thread that looks after caches makes a lock whenever it waits
    monkeypatch.setattr(EXPIRY, "watch", lambda cache: None)
    host, mal = echo_adapter(DirectoryStore(tmp_path), max_dialogues=3)
    mal.dialogues.undo_depth = 2
    turns, kept = Counter(), []
    if leak:  # the test would notice
        host.register_forward_hook(lambda *_: kept.append(mal.last_turn))
    left_behind(mal, host, turns)  # what is made once, and histories at their full length
    before, after = left_behind(mal, host, turns), left_behind(mal, host, turns)
    if leak:
        assert after["TurnReport"] == before["TurnReport"] + 20
        assert after["Tensor"] > before["Tensor"]
    else:
        assert after == before


def test_the_memory_of_a_process_is_measured():
    first = steady(4, 4, marks=2)
    assert [row["turns"] for row in first] == [8, 16]
    kept = torch.ones(2**24)  # 64 MiB
    assert allocated_mib() > first[1]["allocated_mib"] + 32
    assert resident_mib() > first[1]["resident_mib"] + 32
    del kept
    assert trimmed_mib() < resident_mib() + 32


# --- threads and tasks ----------------------------------------------------------------------


def alone(dialogues, turns) -> dict:
    host, mal = echo_adapter()
    for dialogue in range(dialogues):
        for turn in range(turns):
            play(host, mal, dialogue, turn)
    return states(mal, [f"call-{i}" for i in range(dialogues)])


def test_threads_in_the_middle_of_each_others_turns_do_not_see_each_other():
    host, mal = echo_adapter()
    barrier = threading.Barrier(4, timeout=30)
    host.between = barrier.wait  # every turn waits until all four are in the host

    def call(dialogue):
        for turn in range(5):
            opened = play(host, mal, dialogue, turn)
            assert opened.last_turn.tokens == [turn_tokens(dialogue, turn).shape[1]]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert same(states(mal, [f"call-{i}" for i in range(4)]), alone(4, 5))


def test_tasks_that_interleave_inside_their_dialogues_do_not_see_each_other():
    host, mal = echo_adapter()

    async def call(dialogue):
        for turn in range(5):
            with mal.dialogue(f"call-{dialogue}", "AB"[(dialogue + turn) % 2]):
                await asyncio.sleep(0)  # others open theirs
                x = turn_tokens(dialogue, turn)
                if turn % 2:
                    host(inputs_embeds=x)
                else:
                    await asyncio.to_thread(host, inputs_embeds=x)
                await asyncio.sleep(0)

    async def every():
        await asyncio.gather(*map(call, range(4)))

    with torch.no_grad():
        asyncio.run(every())
    assert same(states(mal, [f"call-{i}" for i in range(4)]), alone(4, 5))


def test_disable_adapter_and_masks_are_those_of_a_thread():
    host, mal = echo_adapter()
    x = turn_tokens(0, 0)
    inside, done = threading.Event(), threading.Event()

    def off():
        with mal.disable_adapter():
            inside.set()
            done.wait(30)
            assert torch.equal(host(inputs_embeds=x), x)

    thread = threading.Thread(target=off)
    thread.start()
    inside.wait(30)
    with mal.dialogue("a") as dialogue:
        assert not torch.equal(host(inputs_embeds=x), x)
        assert dialogue.turns == [1]
    done.set()
    thread.join()


def test_a_thread_without_the_open_dialogue_is_refused_and_a_copied_context_has_it():
    host, mal = echo_adapter()
    x = turn_tokens(0, 0)
    with ThreadPoolExecutor(1) as pool, mal.dialogue("a") as dialogue, torch.no_grad():
        with pytest.raises(ArgumentError, match=r"no dialogue\(\) is open in this thread"):
            pool.submit(host, inputs_embeds=x).result()
        assert dialogue.turns == [0]
        pool.submit(contextvars.copy_context().run, host, inputs_embeds=x).result()
        assert dialogue.turns == [1]
    host(inputs_embeds=x)  # none is open anywhere


def test_two_turns_of_one_dialogue_at_once_the_later_is_refused():
    host, mal = echo_adapter()
    barrier = threading.Barrier(2, timeout=30)
    host.between = barrier.wait

    def call(turn):
        try:
            return play(host, mal, 0, turn) and "written"
        except StoreError:
            return "refused"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(call, range(2))) == ["refused", "written"]
    assert len(mal.dialogues.latest("call-0").clips) == 1


def test_a_call_that_failed_in_a_thread_does_not_disturb_the_next():
    host, mal = echo_adapter()

    def fail():
        raise RuntimeError("once")

    host.between = fail
    with pytest.raises(RuntimeError, match="once"), mal.dialogue("a"):
        host(inputs_embeds=turn_tokens(0, 0))
    host.between = lambda: None
    one = turn_tokens(0, 1)[:, :1]
    with mal.dialogue("a") as dialogue:
        host(inputs_embeds=one)
        assert dialogue.turns == [1]


# --- numbers --------------------------------------------------------------------------------


def test_an_exploding_write_is_left_out_for_its_dialogue_only():
    host, mal = echo_adapter()
    x = turn_tokens(0, 0)[:, :4]
    with torch.no_grad():
        with mal.dialogue("alone"):
            host(inputs_embeds=x)
        bound = float(mal.dialogues.latest("alone").states[None].norm().max())
        mal.config.max_state_norm = bound * 1.001
        write = mal.memory.write

        def explode(tokens, cu_seqlens, state):
            update = write(tokens, cu_seqlens, state)
            last = torch.ones(state.batch_size, 1, 1, 1)
            last[-1] = 100.0 if state.batch_size == 2 else 1.0
            return update._replace(state=update.state.map(lambda t: t * last))

        mal.memory.write = explode
        with mal.dialogue(["good", "bad"]) as dialogue:
            host(inputs_embeds=torch.cat([x, x]))
    assert dialogue.last_turn.skipped_by_row == [0, 1]
    assert dialogue.last_turn.skipped == 1
    good, alone_ = (mal.dialogues.latest(n).states[None] for n in ("good", "alone"))
    for a, b in zip(good.tensors(), alone_.tensors(), strict=True):
        torch.testing.assert_close(a, b)
    assert equal(mal.dialogues.latest("bad").states[None], mal.dialogues.initial_state(1))


def test_a_diverged_state_is_seen_and_reset():
    host, mal = echo_adapter()
    play(host, mal, 0, 0)
    snapshot = mal.dialogues.latest("call-0")
    grown = {who: s.map(lambda t: t * 1e30) for who, s in snapshot.states.items()}
    mal.dialogues.commit({"call-0": snapshot._replace(states=grown)})
    with mal.dialogue("call-0") as dialogue:
        assert dialogue.state.is_finite().all()
        assert dialogue.state.norm().min() > mal.config.max_state_norm
        host(inputs_embeds=turn_tokens(0, 1))
        assert dialogue.last_turn.skipped == 1  # it does not get any larger
        dialogue.reset()
        host(inputs_embeds=turn_tokens(0, 1))
        assert dialogue.last_turn.skipped == 0
        assert dialogue.state.norm().max() < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_activations_in_half_precision(dtype):
    host, mal = echo_adapter()
    top = torch.finfo(dtype).max
    x = turn_tokens(0, 0)
    scales = torch.tensor([1.0, 1e3, 6e4, top])
    batch = (x * scales.view(4, 1, 1)).clamp(-top, top).to(dtype)
    with torch.no_grad(), mal.dialogue(list("abcd")) as dialogue:
        for _ in range(3):
            out = host(inputs_embeds=batch)
            batch = batch.roll(1, 1)
            assert out.isfinite().all()
            assert out.dtype == dtype
        assert dialogue.state.is_finite().all()
        assert dialogue.state.norm().max() < 100
        assert dialogue.last_turn.skipped == 0


def test_a_state_does_not_drift():
    table = drift(400, marks=4)["table"]
    assert [row["turns"] for row in table] == [100, 200, 300, 400]
    assert all(error < 1e-5 for row in table for error in row["rms_errors"][:2])
    assert all(norm < 100 for row in table for norm in row["norms"])  # false for NaN
