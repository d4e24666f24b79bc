"""Training and calls that would be for nothing are named, once, with the remedy."""

from __future__ import annotations

import functools
import gc
import logging
import warnings

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks as watchers
from transformers import Trainer, TrainingArguments

from mal_kernels import (
    ArgumentError,
    DetachedWarning,
    MALWarning,
    NoDialogueWarning,
    TrainingWarning,
)
from mal_kernels.testing import tiny_host, tiny_inputs
from tests.support.adapters import attached

WRITES = ("memory.to_k.weight", "memory.to_v.weight", "memory.to_rates.weight")


@pytest.fixture
def host():
    return tiny_host("qwen2_audio")


def turn(host, seconds: int = 5) -> dict:
    inputs = dict(tiny_inputs(host, [[seconds], [6]]))
    return inputs | {"labels": inputs["input_ids"].clone()}


class Turns(torch.utils.data.Dataset):
    def __init__(self, host) -> None:
        self.turns = turn(host)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict:
        return {name: x[i % 2] for name, x in self.turns.items()}


def train(model, host, tmp_path) -> None:
    options = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        save_strategy="no",
    )
    Trainer(model, options, train_dataset=Turns(host)).train()


def step(host, optimizer, dialogue=None, turns: int = 1) -> None:
    for i in range(turns):
        inputs = turn(host, 5 + i)
        loss = (dialogue(**inputs) if dialogue else host(**inputs)).loss
    loss.backward()
    optimizer.step()


def steps(host, optimizer, dialogues) -> None:
    for dialogue in dialogues:
        step(host, optimizer, dialogue)


def test_trainer_on_the_host_alone_is_refused(host, tmp_path) -> None:
    attached(host)
    with pytest.raises(ArgumentError, match=r"steps without a single parameter.*get_peft_model"):
        train(host, host, tmp_path)


def test_an_optimizer_of_something_else_is_named(host) -> None:
    attached(host, freeze=False)
    optimizer = torch.optim.SGD(host.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(host, optimizer)  # that of the memory may come next
    watched = len(watchers)
    with pytest.warns(TrainingWarning, match=r"SGD trains.*none of the memory's parameters"):
        step(host, optimizer)
    assert len(watchers) == watched - 1  # there is nothing more to say


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_with_a_trainer_names_what_never_learns(host, tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from mal_kernels.integrations.peft import MALPeftConfig

    model = peft.get_peft_model(host, MALPeftConfig(heads=2, head_dim=8))
    with pytest.warns(TrainingWarning, match=r"4 of 10 tensors.*to_k.*within one `with") as found:
        train(model, host, tmp_path)
    assert sum(w.category is TrainingWarning for w in found) == 1


def test_several_optimizers_and_dialogues_of_two_turns_say_nothing(host) -> None:
    mal = attached(host, freeze=False)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.0) for x in (host, mal)]
    before = len(watchers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(4):
            step(host, optimizers[0], mal.dialogue([f"a{i}", f"b{i}"]), turns=2)
            optimizers[1].step()
    assert all(p.grad is not None for p in mal.parameters())
    assert len(watchers) == before  # nothing is watched any more


def test_one_turn_a_dialogue_is_named_once(host) -> None:
    mal = attached(host)
    optimizer = torch.optim.SGD(mal.parameters(), lr=0.0)
    with pytest.warns(TrainingWarning) as found:
        steps(host, optimizer, [mal.dialogue([f"a{i}", f"b{i}"]) for i in range(4)])
    (warning,) = (w for w in found if w.category is TrainingWarning)
    assert all(name.removeprefix("memory.") in str(warning.message) for name in WRITES)


def test_what_is_frozen_need_not_learn(host) -> None:
    mal = attached(host)
    for name, parameter in mal.named_parameters():
        parameter.requires_grad_(name in ("memory.to_out.weight", "memory.to_q.weight"))
    optimizer = torch.optim.SGD([p for p in mal.parameters() if p.requires_grad], lr=0.0)
    for _ in range(3):
        step(host, optimizer)


def test_steps_of_other_models_are_no_matter(host) -> None:
    mal = attached(host)
    with mal.dialogue(["a", "b"]):
        host(**turn(host))  # a graph, of which nobody takes gradients
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_gradients_of_before_are_no_matter(host) -> None:
    mal = attached(host)
    host(**turn(host)).loss.backward()  # and nobody steps
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(4):
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert all(p.grad is not None for p in mal.memory.to_out.parameters())


def test_detaching_ends_the_watch(host) -> None:
    before = len(watchers)
    mal = attached(host)
    host(**turn(host))
    assert len(watchers) == before + 1
    mal.detach()
    assert len(watchers) == before


@torch.no_grad()
def test_a_trained_adapter_outside_of_any_dialogue_is_named_once(host, caplog) -> None:
    attached(host)
    inputs = tiny_inputs(host, [[5]])
    with pytest.warns(NoDialogueWarning, match=r"mal\.dialogue\(id\)\.generate") as found:
        host(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.generate(**inputs, max_new_tokens=1)
    assert len([w for w in found if issubclass(w.category, MALWarning)]) == 1
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert record.name == "mal_kernels"


@torch.no_grad()
def test_other_calls_outside_of_a_dialogue_say_nothing(host) -> None:
    mal = attached(host, trained=False)
    inputs = tiny_inputs(host, [[5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host(**inputs)  # not trained
        torch.nn.init.normal_(mal.memory.to_out.weight)
        with mal.disable_adapter():
            host(**inputs)
        mal.dialogue("a")(**inputs)
        with mal.dialogue("a"):
            host(**inputs)
        warnings.simplefilter("ignore", NoDialogueWarning)
        host(**inputs)


def test_generate_outside_of_a_dialogue_is_inference_with_gradients_on(host) -> None:
    attached(host)
    with pytest.warns(NoDialogueWarning):
        host.generate(**tiny_inputs(host, [[5]]), max_new_tokens=1)


def test_an_adapter_that_was_put_out_is_named(host) -> None:
    mal = attached(host)
    forward = type(host).forward.__get__(host)
    host.forward = lambda **inputs: forward(**inputs)
    with pytest.warns(DetachedWarning, match="forward of the host was replaced"):
        mal.dialogue("a")(**tiny_inputs(host, [[5]]))


def test_what_wraps_the_host_is_not_in_the_way(host) -> None:
    mal = attached(host)
    host.forward = functools.wraps(host.forward)(functools.partial(host.forward))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dialogue = mal.dialogue("a")
        dialogue(**tiny_inputs(host, [[5]]))
    assert dialogue.turns == [1]


def test_a_guard_keeps_no_adapter_alive(host) -> None:
    mal = attached(host)
    host(**turn(host))
    guards = mal._attachment.hooks.guards
    watched = guards._watching
    mal.detach()
    del mal, guards
    gc.collect()
    assert watched.id not in watchers
