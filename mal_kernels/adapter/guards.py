"""Warnings for who trains a memory, or calls its host, for nothing: :class:`Guards`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import ArgumentError, DetachedWarning, MALWarning, NoDialogueWarning, TrainingWarning
from ..memory import NeuralMemory

log = logging.getLogger("mal_kernels")

# steps of an optimizer after which a verdict is fair: of several optimizers each steps once first
STEPS = 2


class Guards:
    """Guards look out for training and calls that would be for nothing, and warn once of each.

    Optimizers are watched from the first call of the host that builds a graph until all the
    trainable tensors of the memory were seen with a gradient, and not at all in inference.

    Args:
        memory: returns what is trained.
        is_in_place: tells whether the host still runs the adapter.
    """

    def __init__(self, memory: Callable[[], NeuralMemory], is_in_place: Callable[[], bool]) -> None:
        self.memory, self.is_in_place = memory, is_in_place
        self.said: set[type[MALWarning]] = set()
        self._watching: Any = None  # the handle, until there is a verdict
        self._has_verdict = False
        self._turns = 0  # that build a graph
        # of optimizers without the memory, by id: how many turns there had been at their steps
        self._strangers: dict[int, set[int]] = {}
        self._steps = 0  # of those that have it
        self._learned: set[str] = set()
        self._weights_looked_at = -1

    def turn(self, *, in_dialogue: bool, generating: bool) -> None:
        """Looks at a call of the host that has audio, before it runs."""
        if torch.is_grad_enabled() and not generating:
            self._turns += 1
            self._watch()
        elif not in_dialogue and NoDialogueWarning not in self.said:
            self._look_at_weights()

    def opened(self) -> None:
        """Looks at the host as a dialogue is opened, or called."""
        if not self.is_in_place():
            self._say(
                DetachedWarning,
                "the forward of the host was replaced since attach(), by what does not lead to the "
                "adapter any more: call detach(), and attach(model) after whatever replaced it.",
            )

    def stop(self) -> None:
        """Watches optimizers no longer."""
        if self._watching is not None:
            self._watching.remove()
            self._watching = None

    def _say(self, category: type[MALWarning], message: str) -> None:
        if category in self.said:
            return
        self.said.add(category)
        if log.hasHandlers():  # without any, Python would print it twice
            log.warning(message)
        warnings.warn(message, category, stacklevel=2)

    def _look_at_weights(self) -> None:
        weight = self.memory().to_out.weight
        if weight._version == self._weights_looked_at:
            return  # looking waits for a GPU
        self._weights_looked_at = weight._version
        if weight.is_meta or not weight.detach().any():
            return
        self._say(
            NoDialogueWarning,
            "the host was called outside of any dialogue with a trained adapter, which then "
            "remembers nothing: call mal.dialogue(id).generate(...), or open "
            "`with mal.dialogue(id):` around the calls; within mal.disable_adapter() the host is "
            "alone.",
        )

    # --- training ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        if self._watching is None and not self._has_verdict:
            before_step = WeakMethod(self._before_step)

            def hook(optimizer: Optimizer, *_: Any) -> None:
                found = before_step()
                if found is not None:
                    found(optimizer)

            self._watching = register_optimizer_step_pre_hook(hook)

    def _end_watch(self) -> None:
        self._has_verdict = True
        self.stop()

    def _before_step(self, optimizer: Optimizer) -> None:
        trainable = {n: p for n, p in self.memory().named_parameters() if p.requires_grad}
        with_gradient = {name for name, p in trainable.items() if p.grad is not None}
        if not with_gradient:
            return  # a step of something else
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not theirs.isdisjoint(map(id, trainable.values())):
            self._knows_memory(trainable.keys(), with_gradient)
        elif not self._steps:
            self._knows_no_memory(optimizer, has_any=bool(theirs))

    def _knows_memory(self, trainable: Any, with_gradient: set[str]) -> None:
        self._steps += 1
        self._learned |= with_gradient
        missing = [name for name in trainable if name not in self._learned]
        if missing and self._steps >= STEPS:
            self._say(
                TrainingWarning,
                f"{len(missing)} of {len(trainable)} tensors of the memory have had no gradient in "
                f"{self._steps} steps: {', '.join(missing)}. What a turn writes is learned from a "
                "later turn of the same dialogue that reads it: call backward() after two or more "
                "turns within one `with mal.dialogue(ids):`.",
            )
        if not missing or TrainingWarning in self.said:
            self._end_watch()

    def _knows_no_memory(self, optimizer: Optimizer, *, has_any: bool) -> None:
        remedy = (
            "The adapter is not part of the host: give mal.parameters() to the optimizer, or "
            "train get_peft_model(host, MALPeftConfig(...)) of mal_kernels.integrations.peft."
        )
        if not has_any:
            raise ArgumentError(
                f"{type(optimizer).__name__} steps without a single parameter, so nothing can be "
                f"learned; expected those of the memory, which have gradients. {remedy}"
            )
        # steps without a new turn count once: the gradients are of before
        steps = self._strangers.setdefault(id(optimizer), set())
        steps.add(self._turns)
        if len(steps) >= STEPS:
            self._say(
                TrainingWarning,
                f"{type(optimizer).__name__} trains, but has none of the memory's parameters, "
                f"whose gradients no optimizer uses. {remedy}",
            )
            self._end_watch()
