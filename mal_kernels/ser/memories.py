"""An arm carries a dialogue from turn to turn: the memory family, and its rivals.

Every memory answers one call, ``recall``: sequences of turns go in, and come out changed by what
was remembered when each turn began. A turn reads first and writes afterwards, so that no turn
knows itself or the future.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import MALAdapter, MALConfig, MemoryState, NeuralMemory
from ..errors import ArgumentError
from ..memory import Clips, recall

State = tuple[Tensor, ...]  # each [R, ...]
LINEAR = dict(
    depth=1, max_lr=2.0, lr_init=(0.1, 0.3, 0.6, 1.0), max_grad_norm=None, zero_start=True
)
DEEP = dict(depth=2, max_lr=0.5, max_grad_norm=1.0, zero_start=True)
NEVER = 1e-6  # σ⁻¹ of it is as near to a gate of zero as float32 training leaves it


@dataclass(frozen=True)
class Arm:
    """One way to use the dialogue, as ``--arm``.

    Attributes:
        about: one line for tables.
        kind: ``titans``, ``static``, ``gru``, ``attention``, ``norm``, ``lora`` or ``prompt``.
        options: of :class:`MALConfig`, for ``titans`` and ``static``.
        frozen: gates of the memory that are held at zero.
        by_speaker: whether each speaker has a memory of their own.
    """

    about: str
    kind: str = "titans"
    options: dict[str, Any] = field(default_factory=lambda: LINEAR)
    frozen: tuple[str, ...] = ()
    by_speaker: bool = True

    @property
    def uses_history(self) -> bool:
        """Whether anything but the turn itself can reach the answer."""
        return self.kind not in ("static", "lora")


ARMS = {
    # the memory family
    "gated": Arm("linear memory, 4 heads, gated read", by_speaker=False),
    "gated-speaker": Arm("the same, one memory per speaker"),
    "mlp": Arm("two-layer memory (Titans), inner clip", options=DEEP, by_speaker=False),
    "mlp-speaker": Arm("the same, one memory per speaker", options=DEEP),
    "infini": Arm("linear, no momentum (Infini-attention)", frozen=("momentum", "decay")),
    "recurrence": Arm("linear, decay only (gated recurrence)", frozen=("momentum",)),
    "momentum": Arm("linear, momentum only", frozen=("decay",)),
    "ttt-mlp": Arm("two-layer, no momentum or decay", options=DEEP, frozen=("momentum", "decay")),
    # trained with the same budget, for comparison
    "never-written": Arm("the gated adapter, never written", "static"),
    "gru": Arm("GRU over the speaker's turns", "gru"),
    "attention": Arm("attention over the full history", "attention"),
    "z-norm": Arm("speaker z-normalisation", "norm"),
    "lora": Arm("LoRA of equal size, no memory", "lora"),
    "prompt": Arm("the dialogue so far in the prompt, LoRA", "prompt", by_speaker=False),
}


def build_memory(arm: Arm, hidden_size: int, **changes: Any) -> nn.Module | None:
    """The memory of ``arm`` for a host of that width; ``None`` for arms that have none.

    Args:
        arm: an entry of :data:`ARMS`.
        hidden_size: of the host.
        changes: fields of :class:`MALConfig`, such as ``head_dim``.
    """
    if arm.kind in ("titans", "static"):
        start = {"zero_start": False} if arm.kind == "static" else {}
        options = {**arm.options, **start, **changes}
        mal = MALAdapter(MALConfig(**options, hidden_size=hidden_size))
        kind = TitansMemory if arm.kind == "titans" else NeverWritten
        return kind(mal, arm.frozen)
    width = 4 * changes.get("head_dim", 64)
    baselines = {"gru": GRUMemory, "attention": HistoryAttention, "norm": SpeakerNorm}
    return baselines[arm.kind](hidden_size, width) if arm.kind in baselines else None


class TitansMemory(nn.Module):
    """The memory of a :class:`MALAdapter`, over many turns at once.

    Args:
        mal: an adapter whose width is known.
        frozen: gates held at zero, of ``momentum`` and ``decay``.
    """

    def __init__(self, mal: MALAdapter, frozen: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.mal = mal
        for gate in frozen:
            _hold_at_zero(self.memory, ("lr", "momentum", "decay").index(gate))

    @property
    def memory(self) -> NeuralMemory:
        """Where the parameters are."""
        assert self.mal.memory is not None
        return self.mal.memory

    def initial(self, rows: int) -> State:
        """The state of ``rows`` memories in which nothing was written."""
        state = self.memory.initial_state(rows)
        return (*state.weights, *state.momentum)

    def recall(
        self, x: Tensor, mask: Tensor, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Reads, then writes, turn after turn.

        Args:
            x: audio tokens of ``R`` sequences of ``C`` turns, ``[R, C, A, Dm]``.
            mask: which of them exist, bool ``[R, C, A]``.
            state: of :meth:`initial` or of the call before; ``None`` starts anew.

        Returns:
            ``x`` with the residual of each turn's memory, and the state after the last turn, or
            ``None`` if ``state`` was.
        """
        lengths = mask.sum(-1)  # [R, C]
        if state is None and bool(((lengths == 0) | (lengths == x.shape[2])).all()):
            return self._recall_even(x), None
        return self._recall_uneven(x, mask, state)

    def _recall_even(self, x: Tensor) -> Tensor:
        """All turns have as many tokens: a chunk each, of one causal layer.

        Sequences that end early read and write zeros there, which nobody looks at.
        """
        layer = copy.copy(self.memory)  # a view: it shares the parameters
        layer.chunk_size = x.shape[2]
        residual, _ = layer(x.flatten(1, 2))
        return x + residual.to(x.dtype).unflatten(1, x.shape[1:3])

    def _recall_uneven(
        self, x: Tensor, mask: Tensor, state: State | None
    ) -> tuple[Tensor, State | None]:
        rows, turns = x.shape[:2]
        flat = self.initial(rows) if state is None else state
        half = len(flat) // 2
        memory_state = MemoryState(flat[:half], flat[half:])
        row = torch.arange(rows, device=x.device)
        changed = []
        for t in range(turns):
            places = mask[:, t].flatten().nonzero().squeeze(1)
            clips = Clips(places, F.pad(mask[:, t].sum(-1).cumsum(0), (1, 0)), row)
            hidden, (memory_state, *_) = recall(self.memory, x[:, t], clips, memory_state)
            changed.append(hidden)
        after = (*memory_state.weights, *memory_state.momentum)
        return torch.stack(changed, 1), None if state is None else after


def _hold_at_zero(memory: NeuralMemory, gate: int) -> None:
    """Fixes one gate of the memory at (almost) zero: its logits lose their input and gradient."""
    rows = slice(gate * memory.heads, (gate + 1) * memory.heads)
    rates = memory.to_rates
    with torch.no_grad():
        rates.weight[rows] = 0.0
        rates.bias[rows] = torch.tensor(NEVER).logit()
    for parameter in (rates.weight, rates.bias):
        keep = torch.ones_like(parameter)
        keep[rows] = 0.0
        parameter.register_hook(keep.mul)


class NeverWritten(TitansMemory):
    """This arm is the adapter whose memory is trained with it and never written.

    What it gains over the host is due to training a layer there, not to remembering.
    """

    def __init__(self, mal: MALAdapter, frozen: tuple[str, ...] = ()) -> None:
        super().__init__(mal, frozen)
        for weight in self.memory.init:  # zero would leave it and the output without a gradient
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)

    def recall(
        self, x: Tensor, mask: Tensor, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Reads as :meth:`TitansMemory.recall` does, and writes nothing."""
        index = mask.flatten().nonzero().squeeze(1)
        one = torch.zeros_like(index)
        changed = self.memory.read(x.flatten(0, 1), index, one, self.memory.initial_state(1))
        return changed.view_as(x), state


class _Baseline(nn.Module):
    """A gated residual ``W_out(y ⊙ silu(W_gate x))`` on a state that is not a neural memory.

    Args:
        hidden_size: ``Dm``.
        width: features of the state's read.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.to_gate = nn.Linear(hidden_size, width, bias=False)
        self.to_out = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def add(self, x: Tensor, normed: Tensor, y: Tensor) -> Tensor:
        """``x`` with the residual; ``y`` ``[R, C, A, width]``."""
        return x + self.to_out(y * F.silu(self.to_gate(normed))).to(x.dtype)


def _turn_means(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean token of each turn ``[R, C, Dm]``, and whether it has any ``[R, C, 1]``."""
    there = mask.unsqueeze(-1)
    count = there.sum(2)
    return (x * there).sum(2) / count.clamp(min=1), count > 0


class GRUMemory(_Baseline):
    """A GRU over the mean tokens of the turns; each turn reads its state from before.

    Missing turns may only be at the end of a sequence.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__(hidden_size, width)
        self.to_query = nn.Linear(hidden_size, width, bias=False)
        self.gru = nn.GRU(hidden_size, width, batch_first=True)

    def initial(self, rows: int) -> State:
        """Hidden states ``[R, width]`` of zero."""
        return (torch.zeros(rows, self.gru.hidden_size, device=self.to_out.weight.device),)

    def recall(
        self, x: Tensor, mask: Tensor, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See :meth:`TitansMemory.recall`."""
        normed = self.norm(x)
        mean, there = _turn_means(normed, mask)
        start = (self.initial(len(x)) if state is None else state)[0]
        after, _ = self.gru(mean, start.unsqueeze(0))  # [R, C, width]
        known = torch.cat([start.unsqueeze(1), after], 1)  # before turn 0, 1, ..., C
        changed = self.add(x, normed, known[:, :-1, None] * self.to_query(normed).tanh())
        if state is None:
            return changed, None
        return changed, (known[torch.arange(len(x)), there.squeeze(-1).sum(1)],)


class SpeakerNorm(_Baseline):
    """Each token against the mean and deviation of all earlier turns of its memory.

    The state holds count, sum and sum of squares of the mean tokens, ``[R, 1 + 2 Dm]``.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__(hidden_size, width)
        self.to_value = nn.Linear(hidden_size, width, bias=False)

    def initial(self, rows: int) -> State:
        """Nothing counted yet."""
        return (self.to_out.weight.new_zeros(rows, 1 + 2 * self.norm.normalized_shape[0]),)

    def recall(
        self, x: Tensor, mask: Tensor, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See :meth:`TitansMemory.recall`."""
        normed = self.norm(x)
        mean, there = _turn_means(normed, mask)
        seen = torch.cat([torch.ones_like(mean[..., :1]), mean, mean**2], -1) * there
        start = (self.initial(len(x)) if state is None else state)[0]
        sums = torch.cat([start.unsqueeze(1), start.unsqueeze(1) + seen.cumsum(1)], 1)
        count, total, squares = sums[:, :-1].split([1, mean.shape[-1], mean.shape[-1]], -1)
        centre = total / count.clamp(min=1)
        # one more observation of variance 1 keeps the first turns from exploding
        deviation = ((squares - count * centre**2).clamp(min=0) + 1).div(count + 1).sqrt()
        standard = (normed - centre.unsqueeze(2)) / deviation.unsqueeze(2)
        known = (count > 0).unsqueeze(2)  # before the first turn there is nothing to compare with
        changed = self.add(x, normed, self.to_value(standard) * known)
        return changed, None if state is None else (sums[:, -1],)


class HistoryAttention(_Baseline):
    """Attention of every token over all tokens of all earlier turns: an unbounded state.

    It is the upper end of what a bounded memory can be compared with, on whole dialogues only.
    """

    heads = 4

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__(hidden_size, width)
        self.to_qkv = nn.Linear(hidden_size, 3 * width, bias=False)

    def initial(self, rows: int) -> State:
        """Refused.

        Raises:
            ArgumentError: always; there is no state of fixed size.
        """
        raise ArgumentError(
            "window is set, but attention over the full history has no state to carry from window "
            "to window; leave window unset for this arm."
        )

    def recall(
        self, x: Tensor, mask: Tensor, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See :meth:`TitansMemory.recall`; ``state`` must be ``None``."""
        turns, tokens = x.shape[1:3]
        normed = self.norm(x)
        q, k, v = (
            z.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [R, heads, C * A, D]
            for z in self.to_qkv(normed).chunk(3, -1)
        )
        # a first key and value of zero: what the first turn attends to
        k, v = (F.pad(z, (0, 0, 1, 0)) for z in (k, v))
        turn = torch.arange(turns, device=x.device).repeat_interleave(tokens)
        earlier = (turn[:, None] > turn) & mask.flatten(1)[:, None, :]  # [R, C * A, C * A]
        allowed = F.pad(earlier, (1, 0), value=True).unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        y = y.transpose(1, 2).flatten(2).unflatten(1, (turns, tokens))
        return self.add(x, normed, y), state


def lora_rank(parameters: int, decoder: nn.Module, targets: tuple[str, ...]) -> int:
    """The rank at which LoRA on ``targets`` has nearest to ``parameters`` trainable numbers."""
    per_rank = sum(
        module.in_features + module.out_features
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in targets
    )
    return max(1, round(parameters / per_rank))
