"""Many dialogues, turn by turn, while everything that can fail does.

``python -m tests.reliability.soak``: two worker processes at a time play the same dialogues from a
folder of states, each turn under its number as ``turn_id``. They are killed at random moments;
inside them hosts raise, the store fails before or after it has done its work, and only a few
dialogues fit into memory. In the end every state must equal that of a run in which nothing failed
and one process played.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from mal_kernels import Dialogue, MALAdapter
from mal_kernels.errors import StoreError
from mal_kernels.store import Change, DirectoryStore, SharedStore
from tests.reliability.echo import Echo, echo_adapter, turn_tokens
from tests.reliability.heap import allocated_mib, by_fifths, resident_mib, trimmed_mib

WORKERS = 2  # processes at a time, which all play all dialogues
THREADS = 4  # of a worker
AT_ONCE = 6  # dialogues that a thread plays in turns, so that workers meet in them
EVENT_BYTES = 16  # of a line in the log, about
FAULT_RATE = 0.1  # of the calls of the host, and of those of the store
HOST_FAULTS = (RuntimeError, MemoryError, KeyboardInterrupt, torch.OutOfMemoryError)


class Log:
    """Lines in a file that several processes write, and that outlives them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, event: str, value: float = 0.0) -> None:
        """One event."""
        os.write(self.descriptor, f"{event} {value:.6f}\n".encode())

    def turns(self) -> int:
        """How many so far."""
        return self.path.read_bytes().count(b"turn ")

    def read(self) -> list[tuple[str, float]]:
        """All events so far."""
        lines = (line.split() for line in self.path.read_text().splitlines())
        return [(event, float(value)) for event, value in lines]


class FailingStore:
    """Another store, which fails now and then; half the time after it has done what was asked."""

    def __init__(self, store: SharedStore, log: Log, seed: int) -> None:
        self.store, self.log, self.random = store, log, random.Random(seed)

    def get(self, key: str) -> bytes | None:
        """See :class:`KeyValueStore`."""
        return self._maybe("get", lambda: self.store.get(key))

    def put(self, key: str, value: bytes) -> None:
        """See :class:`KeyValueStore`."""
        self._maybe("put", lambda: self.store.put(key, value))

    def delete(self, key: str) -> None:
        """See :class:`KeyValueStore`."""
        self._maybe("delete", lambda: self.store.delete(key))

    def revision(self, key: str) -> str:
        """See :class:`SharedStore`."""
        return str(self._maybe("revision", lambda: self.store.revision(key)))

    def swap(self, changes: Mapping[str, Change]) -> list[str]:
        """See :class:`SharedStore`."""
        changed: list[str] = self._maybe("swap", lambda: self.store.swap(changes))
        return changed

    def _maybe(self, name: str, call: Callable[[], Any]) -> Any:
        fails, first = self.random.random() < FAULT_RATE, self.random.random() < 0.5
        if fails and first:
            self.log.write(f"store.{name}.before")
            raise StoreError("a planted failure, before")
        result = call()
        if fails:
            self.log.write(f"store.{name}.after")
            raise StoreError("a planted failure, after")
        return result


def play(
    host: Echo, mal: MALAdapter, dialogue: int, turn: int, turn_id: str | None = None
) -> Dialogue:
    """One turn of one of two speakers."""
    speaker = "AB"[(dialogue + turn) % 2]
    with (
        torch.no_grad(),
        mal.dialogue(f"call-{dialogue}", speaker, turn_id=turn_id) as opened,
    ):
        host(inputs_embeds=turn_tokens(dialogue, turn))
    return opened


def in_memory(dialogues: int) -> int:
    """How many of them a worker keeps; the others are evicted and come back again and again."""
    return max(2, dialogues // 10)


def work(folder: Path, dialogues: int, turns: int, log: Log, seed: int) -> None:
    """Plays what is missing until all is there."""
    play_all(*failing_adapter(folder, dialogues, log, seed), dialogues, turns, log, seed)


def failing_adapter(folder: Path, dialogues: int, log: Log, seed: int) -> tuple[Echo, MALAdapter]:
    """A host and a store that fail now and then, and an adapter with little room in memory."""
    backing = FailingStore(DirectoryStore(folder), log, seed)
    host, mal = echo_adapter(backing, max_dialogues=in_memory(dialogues))
    faults = random.Random(seed + 1)

    def maybe_raise() -> None:
        if faults.random() < FAULT_RATE:
            kind = faults.choice(HOST_FAULTS)
            log.write(f"host.{kind.__name__}")
            raise kind("a planted failure")

    host.between = maybe_raise
    return host, mal


def play_all(host: Echo, mal: MALAdapter, dialogues: int, turns: int, log: Log, seed: int) -> None:
    """Plays up to ``turns`` of every dialogue, in several threads, a few at a time at random."""
    errors: list[BaseException] = []

    def run(mine: Sequence[int], draw: random.Random) -> None:
        try:
            left = list(mine)
            while left:
                dialogue = draw.choice(left[:AT_ONCE])
                if not step(host, mal, dialogue, turns, log):
                    left.remove(dialogue)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(
            target=run, args=(range(i, dialogues, THREADS), random.Random(seed * THREADS + i))
        )
        for i in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def step(host: Echo, mal: MALAdapter, dialogue: int, turns: int, log: Log) -> bool:
    """The next turn of a dialogue, again and again until it is there; false if there is none."""
    while True:
        with contextlib.suppress(StoreError):
            done = mal.dialogue(f"call-{dialogue}").turns[0]
            break
    if done == turns:
        return False
    while True:
        start = time.perf_counter()
        try:
            play(host, mal, dialogue, done, turn_id=str(done))
        except (*HOST_FAULTS, StoreError) as error:
            if "changed or forgotten" in str(error):  # the other process was first
                log.write("refused")
            elif "planted" not in str(error):
                raise
        else:
            log.write("turn", time.perf_counter() - start)
            return True


def forked(work: Callable[[], None]) -> int:
    """The id of a copy of this process that does ``work``; it exits with 1 if that raises."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def watch(ends: Mapping[int, int], log: Log, peaks: dict[int, float]) -> tuple[int, int | None]:
    """Waits for the end of a child, or of its time.

    Args:
        ends: length of the log, in bytes, at which a child is killed, by its process. What it is
            doing then is a matter of chance, and how far it has come is not one of the speed of
            the machine.
        log: to which they write.
        peaks: gets the most memory in MiB that each was seen to use.

    Returns:
        Its process and exit status, ``None`` if it was killed.
    """
    while True:
        for child, end in ends.items():
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and log.path.stat().st_size >= end:
                time.sleep(random.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
            if ended:
                return child, os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None
            with contextlib.suppress(OSError, IndexError):
                peaks[child] = max(peaks.get(child, 0.0), resident_mib(child))
        time.sleep(0.01)


def soak(
    dialogues: int,
    turns: int,
    *,
    lifetime: int = 800,
    seed: int = 0,
    on_progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Plays ``turns`` of each of ``dialogues`` under faults, and compares with an undisturbed run.

    Args:
        dialogues: how many.
        turns: of each.
        lifetime: events (turns and faults) after which a worker is killed, at most.
        seed: of the faults.
        on_progress: called with the turns done so far.

    Returns:
        Counts of turns, faults and kills, latencies, memory, and how many states differ.
    """
    draw, kills, peaks = random.Random(seed), 0, dict[int, float]()
    ends, done = dict[int, int](), 0  # workers that are running, and how many found nothing to do
    play(*echo_adapter(), 0, 0)  # what torch loads at the first call, workers then have
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name) / "calls", Log(Path(name) / "log")
        while done < WORKERS:
            while len(ends) + done < WORKERS:
                child = forked(partial(work, folder, dialogues, turns, log, draw.randrange(2**31)))
                ends[child] = log.path.stat().st_size + EVENT_BYTES * draw.randrange(1, lifetime)
            child, status = watch(ends, log, peaks)
            del ends[child]
            on_progress(log.turns())
            # in a process of its own: workers are copies of this one, which must not grow
            _, unreadable = os.waitpid(forked(partial(check_readable, folder, dialogues)), 0)
            if unreadable:
                raise AssertionError("a dialogue in the folder cannot be read")
            if status:
                raise AssertionError(f"a worker ended with status {status}")
            done, kills = done + (status == 0), kills + (status is None)
        differing = compare(folder, dialogues, turns)
        events = log.read()
    faults = Counter(event for event, _ in events if event not in ("turn", "refused"))
    latencies = sorted(1000 * value for event, value in events if event == "turn")
    return {
        "workers_at_a_time": WORKERS,
        "dialogues": dialogues,
        "dialogues_in_memory": in_memory(dialogues),
        "turns": dialogues * turns,
        "turns_that_both_played": len(latencies) - dialogues * turns,
        "turns_refused": sum(event == "refused" for event, _ in events),
        "faults": {"kill -9": kills, **dict(sorted(faults.items()))},
        "turn_ms": percentiles(latencies),
        "worker_mib_by_fifth_of_the_run": by_fifths(list(peaks.values())),
        "states_that_differ": differing,
    }


def steady(
    dialogues: int,
    turns: int,
    *,
    marks: int = 10,
    seed: int = 0,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[dict[str, float]]:
    """Memory of one process under all faults but kills, after each part of the turns.

    Args:
        dialogues: how many.
        turns: of each.
        marks: parts.
        seed: of the faults.
        on_progress: called with the turns done so far.

    Returns:
        For each part: turns so far; MiB in use, asked of malloc, and in use after it has given back
        what it can; live tensors, and all objects that the garbage collector knows.
    """
    table = []
    with tempfile.TemporaryDirectory() as name:
        log = Log(Path(name) / "log")
        host, mal = failing_adapter(Path(name) / "calls", dialogues, log, seed)
        for mark in range(1, marks + 1):
            play_all(host, mal, dialogues, turns * mark // marks, log, seed + mark)
            gc.collect()
            objects = gc.get_objects()
            table.append(
                {
                    "turns": dialogues * (turns * mark // marks),
                    "resident_mib": round(resident_mib(), 1),
                    "allocated_mib": round(allocated_mib(), 1),
                    "trimmed_mib": round(trimmed_mib(), 1),
                    "tensors": sum(issubclass(type(x), torch.Tensor) for x in objects),
                    "objects": len(objects),
                }
            )
            del objects
            on_progress(log.turns())
    return table


def check_readable(folder: Path, dialogues: int) -> None:
    """Every dialogue in the folder loads; raises CheckpointError if one does not."""
    _, mal = echo_adapter(DirectoryStore(folder))
    for dialogue in range(dialogues):
        mal.dialogues.latest(f"call-{dialogue}")


def compare(folder: Path, dialogues: int, turns: int) -> int:
    """Dialogues whose state or history in the folder is not that of an undisturbed run."""
    _, found = echo_adapter(DirectoryStore(folder))
    host, mal = echo_adapter()
    differing = 0
    for dialogue in range(dialogues):
        for turn in range(turns):
            play(host, mal, dialogue, turn)
        name = f"call-{dialogue}"
        here, there = mal.dialogues.latest(name), found.dialogues.latest(name)
        equal = here.clips == there.clips and here.states.keys() == there.states.keys()
        differing += not equal or not all(
            torch.equal(a, b)
            for who in here.states
            for a, b in zip(here.states[who].tensors(), there.states[who].tensors(), strict=True)
        )
        mal.dialogues.forget([name])
    return differing


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of sorted values."""
    marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    last = len(values) - 1
    return {name: round(values[round(share * last)], 3) for name, share in marks.items()}


def main(dialogues: int = 12, turns: int = 25, lifetime: int = 60, seed: int = 0) -> None:
    """Prints the result as JSON; with the defaults, a short one."""
    torch.set_num_threads(1)
    print(json.dumps(soak(dialogues, turns, lifetime=lifetime, seed=seed)))


if __name__ == "__main__":
    typer.run(main)
