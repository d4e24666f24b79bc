"""Hooks run inside a call of the host: :class:`Hooks`."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial, update_wrapper
from os import getpid
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MALConfig
from ..dialogues import Dialogue, TurnReport
from ..errors import ArgumentError, HostError
from ..hosts import Host
from ..memory import NeuralMemory
from .guards import Guards
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
        self.guards = Guards(memory, lambda: is_hooked(host.model))
        self.attached = self._is_site = False
        # by thread, which a call of the host never leaves: turns of a generate that is under way,
        # and of a forward call with audio that is
        self._in_generate: dict[int, Turn] = {}
        self._in_forward: dict[int, Turn] = {}
        # where clips begin is known only when they are there: torch.compile leaves this to Python
        self._eagerly = torch.compiler.disable(lambda function, *args: function(*args))
        # this frame only, not the host inside of it
        self._around_forward = torch.compiler.disable(self._around_forward, recursive=False)  # type: ignore[method-assign]

    def __reduce__(self) -> tuple[Any, ...]:
        # in a copy of the host they find nothing under way, and do nothing
        return _inert, ()

    @property
    def under_way(self) -> bool:
        """Whether a call of the host is."""
        return bool(self._in_forward or self._in_generate)

    def attach(self, undo: ExitStack) -> None:
        """Puts the hooks into the host; closing ``undo`` takes them out again."""
        model, projector, encoder = self.host.model, self.host.projector, self.host.spec.encoder
        reads_embeds = self.config.site == "embeds"
        self.attached = True
        undo.callback(setattr, self, "attached", False)
        undo.callback(self.guards.stop)
        handles = []
        if projector is not None or (reads_embeds and not encoder):
            embeds = self.host.site("embeds")
            self._is_site = embeds is model  # whose hooks run before a call has begun
            handles += (
                []
                if self._is_site
                else [embeds.register_forward_pre_hook(self._at_embeds, with_kwargs=True)]
            )
        if encoder or not reads_embeds:
            at_output = self._at_encoder if encoder else self._at_layer
            # before any hook of transformers that records hidden states
            handles += [self.site.register_forward_hook(at_output, prepend=True)]
        for handle in handles:
            undo.callback(handle.remove)
        # not hooks: these have no end for a call that fails, and some hosts call the forward of
        # their projector, which passes hooks by
        undo.callback(_Around(model, "forward", self._forward).put())
        if projector is not None:
            undo.callback(_Around(projector, "forward", self._project).put())
        if hasattr(model, "generate"):
            undo.callback(_Around(model, "generate", self._generate).put())

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.attached and (
            self._in_forward or self._may_have_audio(self.host.arguments(args, kwargs, forward))
        ):
            return self._around_forward(forward, args, kwargs)
        return forward(*args, **kwargs)

    def _around_forward(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        inputs = self.host.arguments(args, kwargs, forward)
        call = self._eagerly(self._begin_forward, inputs)
        if call is None:
            return forward(*args, **kwargs)
        try:
            if self._is_site:
                args, kwargs = self._eagerly(self._edit_embeds, args, kwargs) or (args, kwargs)
            output = forward(*args, **kwargs)
            self._eagerly(self._end_forward, call)
        finally:
            self._eagerly(call.leave)
        return output

    def _may_have_audio(self, inputs: Mapping[str, Any]) -> bool:
        host = self.host
        if host.projector is not None:
            return True  # which is known when its projector runs
        shape = host.shape(inputs)
        if shape is not None and shape[1] == 1 and not host.spec.streaming:
            return False
        return host.carries_audio(inputs) or bool(self.scopes.masks)

    def _begin_forward(self, inputs: Mapping[str, Any]) -> _UnderWay | None:
        """The turn that a forward call is, or is a part of, from here on."""
        thread, host = get_ident(), self.host
        if not self.scopes.innermost().enabled or not self._may_have_audio(inputs):
            return None
        scope, turn = self.scopes.current(), self._in_generate.get(thread)
        # a mask is that of the prompt, which is the first call in generate
        located = turn is not None and turn.clip_rounds
        if host.projector is None and not (
            host.carries_audio(inputs) if scope.mask is None else not located
        ):
            return None
        if turn is not None:
            _check_owner(turn, scope)
        host.checkpoint_never(self.site)
        turn = turn or self._new_turn(scope, inputs)
        if not host.spec.encoder and host.projector is None:
            turn.locate_clips(host, host.prompted(inputs, turn.given), scope.mask)
        return _UnderWay(turn, self._in_forward)

    def _new_turn(
        self,
        scope: Scope,
        given: Mapping[str, Any],
        batch: int | None = None,
        generating: bool = False,
    ) -> Turn:
        # of this process, not of one that it was forked from
        if scope.dialogue is None and getpid() in self.scopes.dialogues.values():
            raise ArgumentError(
                "no dialogue() is open in this thread or asyncio task, but one is in another: the "
                "turn would be lost. Call dialogue.generate(...) or dialogue(...), open it where "
                "the host is called, or run the call in a contextvars.copy_context(), as "
                "asyncio.to_thread does."
            )
        self.guards.turn(in_dialogue=scope.dialogue is not None, generating=generating)
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
            self._in_forward.pop(thread, None)  # until the next call with audio
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
        return turn if self.scopes.innermost().enabled else None

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

    def _end_forward(self, call: _UnderWay) -> None:
        if not call.turn.generating:
            self._finish(call.turn)

    def _finish(self, turn: Turn) -> None:
        report = turn.commit()
        if report is not None:
            report.finish()
            self.on_turn(turn.dialogue, report)

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.attached or not self.scopes.innermost().enabled:
            return generate(*args, **kwargs)
        scope, outer = self.scopes.current(), self._in_generate.get(get_ident())
        if outer is not None:
            _check_owner(outer, scope)
            return generate(*args, **kwargs)
        given = self.host.arguments(args, kwargs, generate)
        turn = self._new_turn(scope, given, self.host.batch(given), generating=True)
        call = _UnderWay(turn, self._in_generate, self._in_forward)
        try:
            output = generate(*args, **kwargs)
            if self.host.carries_audio(given) and not (turn.clip_rounds or turn.projected):
                raise HostError(_PASSED_BY)
            with torch.no_grad():
                self._finish(turn)
        finally:
            call.leave()
        return output

    def _project(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if self._in_forward or self._in_generate:
            self._eagerly(self._collect_projected, output)
        return output


_PASSED_BY = (
    "generate was given audio, but ran another model than the one that the adapter is attached to: "
    "attach(model) to the model that is called, and before it is copied or wrapped; if it was "
    "compiled and has run before attach(), call torch.compiler.reset()."
)


def _check_owner(turn: Turn, scope: Scope) -> None:
    if scope.dialogue is not turn.dialogue:
        whose, now = (list(x.ids) if x else None for x in (turn.dialogue, scope.dialogue))
        raise ArgumentError(
            f"the host is called for dialogue {now} inside a turn of {whose}, which would be "
            "written with what it hears; call it when that turn has ended, or within "
            "disable_adapter()."
        )


class _UnderWay:
    """A call of the host is under way in this thread until this is left, or dropped with its frame.

    An interrupt can fall before the first line of a ``finally``.
    """

    def __init__(self, turn: Turn, calls: dict[int, Turn], *more: dict[int, Turn]) -> None:
        self.turn, self.undo = turn, partial(_end, turn, get_ident(), (calls, *more))
        # not __del__, which runs after each call and would swallow an interrupt
        self.dropped = weakref.finalize(self, self.undo)
        calls[get_ident()] = turn

    def leave(self) -> None:
        self.undo()
        self.dropped.detach()


def _end(turn: Turn, thread: int, every: tuple[dict[int, Turn], ...]) -> None:
    for calls in every:
        if calls.get(thread) is turn:
            calls.pop(thread, None)


class _Around:
    """A method of a module with the adapter around it; in a copy of the module it is the method."""

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self.module, self.name, self.around = module, name, around
        self.own = module.__dict__.get(name)
        self.method: Callable[..., Any] = getattr(module, name)
        update_wrapper(self, self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.method, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self.module, self.name)) if self.own is None else (_same, (self.own,))

    def put(self) -> Callable[[], None]:
        """Takes the place of the method; returns what leaves it again."""
        setattr(self.module, self.name, self)

        def restore() -> None:
            if self.module.__dict__.get(self.name) is self:
                delattr(self.module, self.name)
                if self.own is not None:
                    setattr(self.module, self.name, self.own)

        return restore


def _same(method: Any) -> Any:
    return method


def _inert() -> Hooks:
    """Hooks in a copy of the host."""
    hooks = object.__new__(Hooks)
    hooks.attached, hooks._in_forward, hooks._in_generate = False, {}, {}
    return hooks


def is_hooked(model: nn.Module) -> bool:
    """Whether an adapter is attached to ``model``, maybe inside of what others put around it."""
    forward = model.__dict__.get("forward")
    return isinstance(inspect.unwrap(forward, stop=_is_around), _Around) if forward else False


def _is_around(function: Any) -> bool:
    return isinstance(function, _Around)
