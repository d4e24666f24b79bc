"""The write and the causal read: launcher of ``csrc/cpu/neural_memory_{fwd,bwd}.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native.packing import call_fields, state_fields
from ..call import MemoryCall, tensors_of
from .library import launch


def memory_fwd(
    call: MemoryCall,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Output, surprise, next weights, momentum, anchor and position.

    The output is empty without queries, anchor and position unless the call keeps them. Where no
    row opens a chunk the anchor is the one given.

    Raises:
        BadValues: a gate is out of bounds.
    """
    k, norm, keeps = call.k, call.residual_norm, call.keeps_position
    stays = _stays_in_its_chunk(call)
    new_weights, new_trace = ([w.new_empty(w.shape) for w in call.weights] for _ in range(2))
    new_anchor = [w.new_empty(w.shape) for w in call.weights if keeps and not stays]
    surprise = call.weights[0].new_empty(call.lr.shape)
    output = k.new_empty(0 if call.q is None else call.q.shape)
    fields = dict(
        **call_fields(call),
        threads=torch.get_num_threads(),
        **state_fields("new_weights", new_weights, norm),
        **state_fields("new_trace", new_trace, norm),
        **state_fields("new_anchor", new_anchor, norm),
        output=None if call.q is None else output,
        surprise=surprise,
    )
    launch("mal_cpu_neural_memory_fwd", fields)
    position = call.next_position() if keeps else k.new_empty(0, dtype=torch.int64)
    return output, surprise, new_weights, new_trace, call.anchor if stays else new_anchor, position


def _stays_in_its_chunk(call: MemoryCall) -> bool:
    """Whether every row begins inside a chunk and opens no other."""
    if call.position is None or call.cu_seqlens is not None:
        return False
    last = call.size - call.k.shape[1]
    return all(0 < position <= last for position in call.position.tolist())


def memory_bwd(
    d_output: Tensor,
    d_surprise: Tensor,
    d_weights: list[Tensor],
    d_trace: list[Tensor],
    d_anchor: list[Tensor],
    call: MemoryCall,
) -> list[Tensor]:
    """Gradients of the tensors that are given, in order."""
    norm = call.residual_norm
    tokens = [None if x is None else x.new_empty(x.shape) for x in call[:3]]
    gates = [None if g is None else g.new_empty(g.shape, dtype=torch.float32) for g in call[3:6]]
    if call.step == "chunk":  # the gates of rows without tokens stay as they are
        gates[1:] = [None if g is None else g.zero_() for g in gates[1:]]
    states = [[w.new_empty(w.shape) for w in layers] for layers in call[6:10]]
    names = ("d_weights", "d_trace", "d_anchor", "d_init")
    fields = dict(
        **call_fields(call),
        threads=torch.get_num_threads(),
        d_output=None if call.q is None else d_output.contiguous(),
        d_surprise=d_surprise.contiguous(),
        **state_fields("d_new_weights", d_weights, norm),
        **state_fields("d_new_trace", d_trace, norm),
        **state_fields("d_new_anchor", d_anchor, norm),
        **dict(zip(("d_q", "d_k", "d_v"), tokens, strict=True)),
        **dict(zip(("d_lr", "d_momentum", "d_decay"), gates, strict=True)),
    )
    for name, layers in zip(names, states, strict=True):
        fields |= state_fields(name, layers, norm)
    launch("mal_cpu_neural_memory_bwd", fields)
    cast = [
        g if g is None or x is None else g.to(x.dtype)
        for g, x in zip(gates, call[3:6], strict=True)
    ]
    return tensors_of([*tokens, *cast, *states])
