"""A call is a turn of its own dialogue or is refused; what ends or fails leaves nothing behind."""

from __future__ import annotations

import threading
from contextvars import copy_context

import pytest
import torch

from mal_kernels.adapter import scope as scopes
from mal_kernels.errors import ArgumentError, HostError, StoreError
from mal_kernels.testing import tiny_host, tiny_inputs
from tests.support.adapters import attached
from tests.support.interrupts import interrupted_at


def turns(mal, *names):
    return [len(mal.dialogues.latest(name).clips) for name in names]


def assert_nothing_is_left(mal):
    hooks = mal._attachment.hooks
    assert not scopes._SCOPES.get()
    assert not mal._scopes.dialogues
    assert not hooks._in_forward
    assert not hooks._in_generate


def test_the_owner_travels_with_the_call(host):
    mal, x = attached(host), tiny_inputs(host, [[5]])

    def stream(name):
        for seed in range(2):
            mal.dialogue(name)(**tiny_inputs(host, [[5]], seed=seed))
            yield

    for _ in zip(stream("a"), stream("b"), strict=True):
        pass
    with mal.dialogue("ambient"):
        thread = threading.Thread(target=mal.dialogue("c").generate, kwargs=x)
        thread.start()
        thread.join()
    assert turns(mal, "a", "b", "c", "ambient") == [2, 2, 1, 0]
    assert_nothing_is_left(mal)


def test_a_generator_may_not_open_a_dialogue(host):
    mal = attached(host)

    def stream():
        with mal.dialogue("a"):
            yield

    with pytest.raises(ArgumentError, match=r"generator stream\(\) .* dialogue.generate"):
        next(stream())
    assert_nothing_is_left(mal)


def test_a_closed_dialogue_gets_no_turn(host):
    mal, x = attached(host), tiny_inputs(host, [[5]])
    with mal.dialogue("a"):
        context = copy_context()
    with pytest.raises(ArgumentError, match=r"dialogue\(\['a'\]\), which has ended"):
        context.run(host, **x)
    one, two = mal.dialogue("a"), mal.dialogue("b")
    one.__enter__(), two.__enter__()
    one.__exit__(None, None, None), two.__exit__(None, None, None)
    host(**x)
    assert turns(mal, "a", "b") == [0, 0]
    assert_nothing_is_left(mal)


def test_another_dialogue_inside_a_turn_is_refused(host):
    mal, x = attached(host), tiny_inputs(host, [[5]])
    handle = host.lm_head.register_forward_hook(lambda *_: mal.dialogue("b").generate(**x))
    with pytest.raises(ArgumentError, match=r"\['b'\] inside a turn of \['a'\]"):
        mal.dialogue("a").generate(**x)
    handle.remove()
    assert turns(mal, "a", "b") == [0, 0]
    assert_nothing_is_left(mal)


SHORT = 29, ["mal_kernels/adapter/"]
LONG = 1, ["mal_kernels/adapter/", "mal_kernels/dialogues/", "contextlib.py"]
SHORT_KINDS = [("qwen2_audio", "embeds"), ("whisper", "embeds"), ("ultravox", "embeds")]
LONG_KINDS = [  # decoders, an encoder and projectors, inside of them or not, and a streaming host
    *SHORT_KINDS,
    *(("qwen2_audio", 1), ("gemma3n", "embeds"), ("gemma3n", 1), ("phi4_multimodal", "embeds")),
    *(("moshi", "embeds"), ("ltu", "embeds")),
]


# every line of what holds something between calls, some 10 minutes in all
SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        *((kind, SHORT) for kind in SHORT_KINDS),
        *(pytest.param(kind, LONG, marks=SLOW) for kind in LONG_KINDS),
    ],
)
@pytest.mark.parametrize("method", ["__call__", "generate"])
def test_an_interrupt_at_any_line_leaves_nothing(kind, lines, method):
    name, site = kind
    step, where = lines
    host = tiny_host(name).requires_grad_(False)
    mal = attached(host, site).requires_grad_(False)
    first, second = (tiny_inputs(host, [[5]], seed=seed) for seed in range(2))
    more = {"max_new_tokens": 1} if method == "generate" else {}

    def turn(dialogue, x):
        with mal.dialogue(dialogue):
            getattr(host, method)(**x, **more)

    for x in (first, second):
        turn("undisturbed", x)
    _, before, after = mal.dialogues._histories["undisturbed"].snapshots
    written, line = 0, 3
    turn("a", first)
    while interrupted_at(line, lambda: turn("a", second), where):
        assert_nothing_is_left(mal)
        now = mal.dialogues.latest("a")
        if same(now, after):
            written += 1
            mal.dialogues.undo(["a"])
        else:
            assert same(now, before), line
        line += step
    assert line > 3
    assert written or step > 1  # the lines after the write, too
    assert same(mal.dialogues.latest("a"), after)


def same(snapshot, other) -> bool:
    return snapshot.clips == other.clips and all(
        torch.equal(x, y)
        for who, state in other.states.items()
        for x, y in zip(snapshot.states[who].tensors(), state.tensors(), strict=True)
    )


def test_detach_during_a_turn_is_refused(host):
    mal, x = attached(host), tiny_inputs(host, [[5]])
    handle = host.lm_head.register_forward_hook(lambda *_: mal.detach())
    with pytest.raises(HostError, match="under way"):
        mal.dialogue("a").generate(**x)
    handle.remove()
    assert_nothing_is_left(mal)


def test_a_report_holds_no_embeddings(host):
    mal = attached(host)
    mal.dialogue("a").generate(**tiny_inputs(host, [[5]]))
    held = [t for x in vars(mal.last_turn).values() if isinstance(x, dict) for t in x.values()]
    assert max(t.numel() for t in held) <= mal.config.heads
    assert not mal.last_turn._heard
    assert not mal.last_turn._written
    assert mal.last_turn.residual_ratio.isfinite().all()


def test_called_turns_of_one_dialogue_queue_if_they_may_wait(host):
    mal, x = attached(host), tiny_inputs(host, [[5]])
    runs, failures = [], []
    host.register_forward_pre_hook(lambda *_: runs.append(1))

    def turn(wait):
        try:
            mal.dialogue("a", wait=wait)(**x)
        except StoreError as error:
            failures.append(str(error))

    with mal.dialogues.queue(["a"], 0):  # another turn is under way
        refused = threading.Thread(target=turn, args=(0,))
        refused.start()
        refused.join()
        queued = threading.Thread(target=turn, args=(600,))
        queued.start()
        assert not runs
    queued.join()
    assert turns(mal, "a") == [1]
    assert len(runs) == len(failures) == 1
    assert "play this one again" in failures[0]
    with pytest.raises(ArgumentError, match="wait is -1; pass seconds"):
        mal.dialogue("a", wait=-1)
    assert_nothing_is_left(mal)
