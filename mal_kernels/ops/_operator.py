"""The operators of ``torch.ops.mal_kernels``, and the way past torch's dispatcher.

A registered operator is what ``torch.compile``, fake tensors and modes see. Its dispatch costs more
than a token's write: a call of plain tensors that nobody looks at goes to the kernel at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..call import emptied, refilled, tensors_of

LIBRARY = torch.library.Library("mal_kernels", "FRAGMENT")
PLAIN = {Tensor, nn.Parameter}  # the types of tensors in which no other library has a part


class Operator:
    """An operator: what it computes, what it returns without computing, and its gradients.

    Args:
        schema: name, arguments and results, all arguments positional and without defaults.
        run: computes the results.
        fake: makes results of the right shapes.
        gradient: given arguments, results and the gradients of the results, the gradients of the
            first tensors among the arguments, in order; the others have none. None: not
            differentiable.
    """

    def __init__(
        self,
        schema: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        gradient: Callable[[list[Any], list[Any], list[Any]], Sequence[Tensor | None]]
        | None = None,
    ) -> None:
        self.run, self.gradient = run, gradient
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self._apart, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mal_kernels::{name}", fake, lib=LIBRARY)
        if gradient is not None:
            LIBRARY.impl(name, self._at_autograd, "Autograd", with_keyset=True)
        self.overload = getattr(torch.ops.mal_kernels, name).default

    def __call__(self, *fields: Any) -> Any:
        """The results, past the dispatcher where nothing but the values can depend on it."""
        if torch.compiler.is_compiling():
            return self.overload(*fields)
        tensors = tensors_of(fields)
        if not _are_plain(tensors):
            return self.overload(*fields)
        if self.gradient is not None and _want_gradients(tensors):
            return self._recorded(self._apart, fields, tensors)
        return self.run(*fields)

    def _apart(self, *fields: Any) -> Any:
        """The results, none of which is an argument: an operator must not return those."""
        result, given = self.run(*fields), {id(t) for t in tensors_of(fields)}
        if not isinstance(result, tuple):
            return result
        return tuple(
            refilled(result, [t.clone() if id(t) in given else t for t in tensors_of(result)])
        )

    def _at_autograd(self, keyset: torch._C.DispatchKeySet, *fields: Any) -> Any:
        def below(*fields: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *fields)

        tensors = tensors_of(fields)
        return (
            self._recorded(below, fields, tensors) if _want_gradients(tensors) else below(*fields)
        )

    def _recorded(
        self, run: Callable[..., Any], fields: Sequence[Any], tensors: list[Tensor]
    ) -> Any:
        made: list[list[Any]] = []
        found = _Recorded.apply(self, run, fields, made, *tensors)
        results = refilled(made[0], found)
        return tuple(results) if len(results) > 1 else results[0]


class _Recorded(torch.autograd.Function):
    """An operator on autograd's tape, on which lists are their tensors one by one."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        run: Callable[..., Any],
        fields: Sequence[Any],
        made: list[list[Any]],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Puts the results, without their tensors, into ``made``."""
        result = run(*fields)
        result = result if isinstance(result, tuple) else (result,)
        made.append(emptied(result))
        outputs = tensors_of(result)
        ctx.operator, ctx.inputs, ctx.outputs = operator, emptied(fields), made[0]
        ctx.save_for_backward(*tensors, *outputs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors among the arguments."""
        count = len(ctx.saved_tensors) - len(d_outputs)
        inputs = refilled(ctx.inputs, ctx.saved_tensors[:count])
        outputs = refilled(ctx.outputs, ctx.saved_tensors[count:])
        found = ctx.operator.gradient(inputs, outputs, refilled(ctx.outputs, d_outputs))
        return (None,) * 4 + (*found, *(None,) * (count - len(found)))


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether no subclass, mode, transform, tracer or profiler has to see the call."""
    return (
        {type(t) for t in tensors} <= PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
    )


def _want_gradients(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
