"""What runs inside a call of the host: :class:`Hooks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MALConfig
from ..dialogues import Dialogue, TurnReport
from ..errors import ArgumentError, HostError
from ..hosts import Host
from ..memory import NeuralMemory
from .scope import Scope, Scopes
from .turn import Turn


class Hooks:
    """Each call of a host that has audio becomes a :class:`Turn` here.

    The hooks decide by Python facts, and a decode step leaves at the first of them: a compiled
    decode step has no graph break and no recompilation because of them. What belongs to a thread is
    looked up outside of compiled code, which would keep what it saw the first time.

    Args:
        host: what is called.
        site: the module of it where the memory is read.
        memory: returns what reads and writes.
        config: of the adapter.
        scopes: tell which dialogue a call belongs to.
        on_turn: is given the dialogue and the report of each turn that was written.
    """

    def __init__(
        self,
        host: Host,
        site: nn.Module,
        memory: Callable[[], NeuralMemory],
        config: MALConfig,
        scopes: Scopes,
        on_turn: Callable[[Dialogue | None, TurnReport], None],
    ) -> None:
        self.host, self.site, self.memory, self.config = host, site, memory, config
        self.scopes, self.on_turn = scopes, on_turn
        self.attached = False
        # by thread, which a call of the host never leaves: turns of a generate that is under way,
        # and of a forward call with audio that is
        self._in_generate: dict[int, Turn] = {}
        self._in_forward: dict[int, Turn] = {}
        # where clips begin is known only when they are there: torch.compile leaves this to Python
        self._eagerly = torch.compiler.disable(lambda function, *args: function(*args))

    def attach(self, undo: ExitStack) -> None:
        """Puts the hooks into the host; closing ``undo`` takes them out again."""
        model, projector, encoder = self.host.model, self.host.projector, self.host.spec.encoder
        reads_embeds = self.config.site == "embeds"
        self.attached = True
        undo.callback(setattr, self, "attached", False)
        handles = [
            model.register_forward_pre_hook(self._before_host, with_kwargs=True),
            model.register_forward_hook(self._after_host),
        ]
        if projector is not None or (reads_embeds and not encoder):
            embeds = self.host.site("embeds")
            handles += [embeds.register_forward_pre_hook(self._at_embeds, with_kwargs=True)]
        if encoder or not reads_embeds:
            at_output = self._at_encoder if encoder else self._at_layer
            # before any hook of transformers that records hidden states
            handles += [self.site.register_forward_hook(at_output, prepend=True)]
        for handle in handles:
            undo.callback(handle.remove)
        if projector is not None:
            self._wrap_projector(projector, undo)
        if hasattr(model, "generate"):
            self._wrap_generate(model, undo)

    def _before_host(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = self.host.arguments(args, kwargs)
        if self._in_forward or self._may_have_audio(inputs):
            self._eagerly(self._begin_forward, inputs)

    def _may_have_audio(self, inputs: Mapping[str, Any]) -> bool:
        host = self.host
        if host.projector is not None:
            return True  # which is known when its projector runs
        shape = host.shape(inputs)
        if shape is not None and shape[1] == 1 and not host.spec.streaming:
            return False
        return host.carries_audio(inputs) or bool(self.scopes.masks)

    def _begin_forward(self, inputs: Mapping[str, Any]) -> None:
        thread, scope, host = get_ident(), self.scopes.current(), self.host
        self._in_forward.pop(thread, None)  # left behind by a call that failed
        if not scope.enabled or not self._may_have_audio(inputs):
            return
        turn = self._in_generate.get(thread)
        # a mask is that of the prompt, which is the first call in generate
        located = turn is not None and turn.clip_rounds
        if host.projector is None and not (
            host.carries_audio(inputs) if scope.mask is None else not located
        ):
            return
        host.checkpoint_never(self.site)
        turn = turn or self._new_turn(scope, inputs)
        if not host.spec.encoder and host.projector is None:
            turn.locate_clips(host, host.prompted(inputs, turn.given), scope.mask)
        self._in_forward[thread] = turn

    def _new_turn(
        self,
        scope: Scope,
        given: Mapping[str, Any],
        batch: int | None = None,
        generating: bool = False,
    ) -> Turn:
        if scope.dialogue is None and self.scopes.dialogues:
            raise ArgumentError(
                "no dialogue() is open in this thread or asyncio task, but one is in another: the "
                "turn would be lost. Open it where the host is called, or run the call in a "
                "contextvars.copy_context(), as asyncio.to_thread does."
            )
        return Turn(
            self.memory(),
            scope.dialogue,
            given,
            batch,
            generating=generating,
            max_state_norm=self.config.max_state_norm,
        )

    def _at_embeds(
        self, site: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return self._eagerly(self._edit_embeds, args, kwargs) if self._in_forward else None

    def _edit_embeds(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        embeds, put = self.host.embeds_of(args, kwargs)
        if embeds is None:
            return None
        turn = self._in_forward.get(get_ident())
        if turn is not None and turn.projected:
            turn.locate_projected(self.host, embeds, kwargs.get("attention_mask"))
        return put(self._inject(embeds)) if self.config.site == "embeds" else None

    def _at_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._eagerly(self._edit_output, output) if self._in_forward else None

    def _edit_output(self, output: Any) -> Any:
        hidden, put = self.host.hidden_of(output)
        return put(self._inject(hidden))

    def _inject(self, hidden: Tensor) -> Tensor:
        thread = get_ident()
        turn = self._in_forward.get(thread)
        if turn is None or turn.expected_shape is None:
            return hidden
        hidden = turn.inject(hidden)
        if turn.generating:
            self._in_forward.pop(thread)  # until the next call with audio
        return hidden

    def _collect_projected(self, output: Tensor) -> None:
        turn = self._current()
        if turn is not None:
            turn.projected.append(output)
            self._in_forward[get_ident()] = turn

    def _current(self) -> Turn | None:
        """The turn of this thread; ``generate`` may run parts of the model without the whole."""
        thread = get_ident()
        turn = self._in_forward.get(thread) or self._in_generate.get(thread)
        return turn if self.scopes.current().enabled else None

    def _at_encoder(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        under_way = self._in_forward or self._in_generate
        return self._eagerly(self._edit_encoded, output) if under_way else None

    def _edit_encoded(self, output: Any) -> Any:
        # generate runs the encoder before the model, which does not get to see the audio
        turn = self._current()
        if turn is None:
            return None
        if turn.clip_rounds:
            raise HostError(
                "the encoder ran again in one call, as for audio longer than its window or for "
                "another temperature; pass one window and one temperature in each call."
            )
        turn.locate_clips(self.host, *self.host.encoded(output, turn.given))
        hidden, put = self.host.hidden_of(output)
        return put(turn.inject(hidden))

    def _after_host(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._in_forward:
            self._eagerly(self._end_forward)

    def _end_forward(self) -> None:
        thread = get_ident()
        turn = self._in_forward.pop(thread, None)
        if turn is not None and thread not in self._in_generate:
            self._finish(turn)

    def _finish(self, turn: Turn) -> None:
        report = turn.commit()
        if report is not None:
            self.on_turn(turn.dialogue, report)

    def _wrap_generate(self, model: nn.Module, undo: ExitStack) -> None:
        generate: Any = model.generate

        @wraps(generate)
        def generate_one_turn(*args: Any, **kwargs: Any) -> Any:
            thread, scope = get_ident(), self.scopes.current()
            if not scope.enabled or not self.attached or thread in self._in_generate:
                return generate(*args, **kwargs)
            given = self.host.arguments(args, kwargs, generate)
            turn = self._new_turn(scope, given, self.host.batch(given), generating=True)
            self._in_forward.pop(thread, None)  # left behind by a call that failed
            self._in_generate[thread] = turn
            try:
                output = generate(*args, **kwargs)
                with torch.no_grad():
                    self._finish(turn)
            finally:
                self._in_generate.pop(thread)
                self._in_forward.pop(thread, None)
            return output

        generate_one_turn.mal_hooks = self  # type: ignore[attr-defined]
        undo.callback(_replace(model, "generate", generate_one_turn))

    def _wrap_projector(self, projector: nn.Module, undo: ExitStack) -> None:
        forward = projector.forward

        @wraps(forward)
        def collecting(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self._in_forward or self._in_generate:
                self._eagerly(self._collect_projected, output)
            return output

        # not a hook: some hosts call the forward of their projector, which passes hooks by
        undo.callback(_replace(projector, "forward", collecting))


def is_hooked(model: nn.Module) -> bool:
    """Whether an adapter is attached to ``model``."""
    return hasattr(model.__dict__.get("generate"), "mal_hooks")


def _replace(module: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Puts ``method`` in the place of one of ``module``; returns what takes it out again."""
    own = module.__dict__.get(name)
    setattr(module, name, method)

    def restore() -> None:
        if module.__dict__.get(name) is method:
            delattr(module, name)
            if own is not None:
                setattr(module, name, own)

    return restore
