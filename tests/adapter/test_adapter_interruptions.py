"""A call that fails, is repeated or is recomputed writes nothing twice and nothing half."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from transformers import LogitsProcessorList

from mal_kernels.testing import tiny_inputs
from tests.support.adapters import (
    SITES,
    assert_identical,
    assert_same_states,
    attached,
    generate,
    states_of,
)


def interrupt(kind: type[BaseException]):
    def raise_it(*_args, **_kwargs):
        raise kind("interrupted")

    return raise_it


def second_step(error: type[BaseException]):
    """A logits processor that raises in the second decode step."""
    steps = iter([False, True])

    def processor(_ids, scores):
        if next(steps):
            raise error("interrupted")
        return scores

    return LogitsProcessorList([processor])


def in_the_encoder(host, x, error):
    handle = host.model.audio_tower.register_forward_hook(interrupt(error))
    try:
        host.generate(**x, max_new_tokens=3)
    finally:
        handle.remove()


def in_the_prefill(host, x, error):
    handle = host.model.language_model.layers[2].register_forward_hook(interrupt(error))
    try:
        host.generate(**x, max_new_tokens=3)
    finally:
        handle.remove()


def in_a_decode_step(host, x, error):
    host.generate(**x, max_new_tokens=3, logits_processor=second_step(error))


def in_a_forward_call(host, x, error):
    handle = host.lm_head.register_forward_hook(interrupt(error))
    try:
        host(**x)
    finally:
        handle.remove()


def in_the_write(host, x, error):
    memory = host.forward.around.__self__.memory()
    memory.write = interrupt(error)
    try:
        host.generate(**x, max_new_tokens=3)
    finally:
        del memory.write


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "where",
    [in_the_encoder, in_the_prefill, in_a_decode_step, in_a_forward_call, in_the_write],
)
def test_an_interrupted_turn_leaves_everything_as_it_was(host, site, error, where):
    mal = attached(host, site)
    x, y = (tiny_inputs(host, [[5], [3]], seed=i) for i in range(2))
    ids = ["a", "b"]
    with mal.dialogue(ids, "A"):
        host.generate(**x, max_new_tokens=2)
        before, report = mal.dialogues._histories, mal.last_turn
        with pytest.raises(error, match="interrupted"):
            where(host, y, error)
        assert mal.dialogues._histories is before
        assert mal.last_turn is report
        # no later call inherits the audio of the failed one: text, one token, or the plain host
        for text in (tiny_inputs(host, [[], []]), {"input_ids": torch.tensor([[5], [6]])}):
            with mal.disable_adapter():
                logits = host(**text).logits
            with suppress(error):
                where(host, y, error)
            assert torch.equal(host(**text).logits, logits)
        assert mal.dialogues._histories is before
        after = generate(host, y)
    resumed = states_of(mal)
    mal.dialogues.forget()
    with mal.dialogue(ids, "A"):
        host.generate(**x, max_new_tokens=2)
        assert_identical(generate(host, y), after)
    assert_same_states(states_of(mal), resumed)
