"""The layer around the ops, :class:`NeuralMemory`, and :func:`recall`, a turn of a dialogue."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import ops
from .call import chunk_counts, n_chunks
from .config import check_start
from .network import RMS_NORM_EPS
from .ops import MemoryUpdate, ReadParams
from .ops._check import check_bounds, check_cu_seqlens, expect, is_float
from .state import MemoryState


class NeuralMemory(nn.Module):
    """A Titans neural memory (arXiv 2501.00663) as a plain module: state in, state out.

    Hidden states are RMS-normalised and projected to q, k, v (q and k L2-normalised) and to the
    gates ``lr = max_lr·σ``, ``momentum = σ``, ``decay = σ``. The read is gated,
    ``W_out (y ⊙ silu(W_gate x))``. Decay pulls toward the learned initial weights.

    With ``step="token"`` this is the causal Titans layer. With ``step="chunk"`` momentum and decay
    act once per chunk (their logits averaged over its tokens) and ``lr`` is divided by the chunk's
    number of tokens: a chunk writes the *mean* gradient, whatever its length. Memory-as-a-Layer
    uses that with ``chunk_size=None``, one step per turn.

    Args:
        hidden_size: features ``Dm`` of the hidden states.
        heads: independent memories ``H``.
        head_dim: features ``D`` of a head's keys and values.
        expansion: hidden width of the memory network, ``E = expansion · D``.
        depth: layers of the memory network; 1 is a linear memory, which starts at zero.
        activation: gelu (erf), gelu_tanh, silu or relu.
        residual_norm: ``M(x) = x + (1 + γ) ⊙ LayerNorm(mlp(x))`` with γ a fast weight.
        step: ``"token"`` or ``"chunk"``.
        chunk_size: tokens between refreshes of the gradient's anchor; None: one chunk per call.
        max_lr: upper bound of the write rate; above 0.5 a memory of depth 2 can diverge.
        lr_init: initial write rate per head, each below ``max_lr``; None spreads them evenly in
            logarithm over the decade below ``max_lr/2``.
        momentum_init: initial η.
        decay_init: initial α.
        max_grad_norm: bound of every token's inner gradient norm; None: no bound.
        zero_start: a memory that nothing was written to reads exactly zero: the last layer of its
            initial weights is zero and no parameter.
        zero_init_output: start as the identity when the output is added to the hidden states.
        backend: passed to the ops.

    Raises:
        ArgumentError: ``lr_init`` does not fit ``heads`` and ``max_lr``, or ``zero_start`` is asked
            of a memory with ``residual_norm``, which reads its input where it knows nothing.

    Example:
        >>> import torch
        >>> from mal_kernels import NeuralMemory
        >>> layer = NeuralMemory(32, heads=2, head_dim=16, chunk_size=8)
        >>> x = torch.randn(1, 20, 32)
        >>> y, state = layer(x)
        >>> first, part = layer(x[:, :13])
        >>> second, part = layer(x[:, 13:], part)
        >>> torch.allclose(torch.cat([first, second], 1), y, atol=1e-5)
        True
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int = 4,
        head_dim: int = 64,
        expansion: int = 2,
        depth: int = 2,
        activation: str = "gelu",
        residual_norm: bool = False,
        step: str = "token",
        chunk_size: int | None = 64,
        max_lr: float = 0.5,
        lr_init: Sequence[float] | None = None,
        momentum_init: float = 0.01,
        decay_init: float = 0.01,
        max_grad_norm: float | None = 1.0,
        zero_start: bool = False,
        zero_init_output: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_start("NeuralMemory", heads, max_lr, lr_init, zero_start, residual_norm)
        self.heads, self.head_dim, self.max_lr = heads, head_dim, max_lr
        self.step, self.chunk_size, self.max_grad_norm = step, chunk_size, max_grad_norm
        self.activation, self.residual_norm, self.backend = activation, residual_norm, backend
        inner = heads * head_dim
        self.norm = nn.Parameter(torch.ones(hidden_size))
        self.to_q = nn.Linear(hidden_size, inner, bias=False)
        self.to_k = nn.Linear(hidden_size, inner, bias=False)
        self.to_v = nn.Linear(hidden_size, inner, bias=False)
        self.to_gate = nn.Linear(hidden_size, inner, bias=False)
        self.to_out = nn.Linear(inner, hidden_size, bias=False)
        if zero_init_output:
            nn.init.zeros_(self.to_out.weight)
        self.to_rates = nn.Linear(hidden_size, 3 * heads)  # logits of lr, momentum, decay
        self._init_rates(lr_init, momentum_init, decay_init)
        weights = self._initial_weights(expansion * head_dim, depth)
        self.zero_start = zero_start
        self.init = nn.ParameterList(weights[:-1] if zero_start else weights)

    def _init_rates(
        self, lr_init: Sequence[float] | None, momentum_init: float, decay_init: float
    ) -> None:
        heads = self.heads
        if lr_init is None:
            lr_init = [self.max_lr * 0.5 * 10 ** ((h + 1) / heads - 1) for h in range(heads)]
        lr = torch.tensor(lr_init) / self.max_lr
        rest = torch.tensor([momentum_init, decay_init]).repeat_interleave(heads)
        with torch.no_grad():
            self.to_rates.weight.mul_(0.1)  # near the given rates whatever the input
            self.to_rates.bias.copy_(torch.cat([lr, rest]).logit())

    def _initial_weights(self, width: int, depth: int) -> list[nn.Parameter]:
        dims = [self.head_dim, *[width] * (depth - 1), self.head_dim]
        shapes = [(self.heads, a, b) for a, b in pairwise(dims)]
        # a linear memory learns from zero; two zero layers would have no gradient
        scale = 0.0 if depth == 1 else 1.0
        weights = [scale * torch.randn(s) / s[1] ** 0.5 for s in shapes]
        if self.residual_norm:
            weights.append(torch.zeros(self.heads, self.head_dim))
        return [nn.Parameter(w) for w in weights]

    def initial_state(self, batch_size: int) -> MemoryState:
        """The learned initial memory for ``batch_size`` rows; gradients reach it."""
        dtype = torch.promote_types(self.norm.dtype, torch.float32)
        weights = [w.to(dtype).expand(batch_size, *w.shape) for w in self.init]
        if self.zero_start:
            width = weights[-1].shape[-1] if weights else self.head_dim
            shape = (batch_size, self.heads, width, self.head_dim)
            weights.append(self.norm.new_zeros((), dtype=dtype).expand(shape))
        return MemoryState.from_weights(weights)

    def forward(
        self,
        hidden: Tensor,
        state: MemoryState | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """The causal layer.

        Padding is neither read nor written: each row of a padded batch is that row alone.

        Args:
            hidden: ``[B, T, Dm]``.
            state: one row per sequence, from an earlier call; None starts at the learned initial
                memory.
            lengths: ``[B]`` int64, tokens of each row that count; what follows them is padding,
                whose output is zero.
            cu_seqlens: ``[N + 1]`` int64, where each of ``N`` sequences begins and ends in
                ``hidden`` ``[1, T, Dm]``.

        Returns:
            ``[B, T, Dm]``, to be added to ``hidden`` (it is not yet), and the next state.

        Raises:
            ArgumentError: ``hidden`` is not as wide as the layer, or lengths do not fit it.
        """
        width = len(self.norm)
        fits = is_float(hidden) and hidden.dim() == 3 and hidden.shape[-1] == width
        expect(fits, "hidden", hidden, f"floating point [B, T, {width}]")
        if lengths is None:
            check_cu_seqlens(cu_seqlens, hidden)
            check_bounds(cu_seqlens, hidden.shape[1])
            return self._causal(hidden, state, cu_seqlens)
        lengths = _checked_lengths(lengths, cu_seqlens, hidden)
        shown = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        ends = F.pad(lengths.cumsum(0), (1, 0))
        y, state = self._causal(hidden[shown].unsqueeze(0), state, ends)
        return y.new_zeros(hidden.shape).index_put((shown,), y.squeeze(0)), state

    def _causal(
        self, hidden: Tensor, state: MemoryState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MemoryState]:
        x = self._normed(hidden)
        if cu_seqlens is None:
            rows, (segment, chunks) = len(hidden), self._segments_of_rows(hidden)
        else:
            rows = len(cu_seqlens) - 1
            segment, chunks = self._segments(hidden.shape[1], cu_seqlens)
        if state is None:
            state = self.initial_state(rows)
        rates = self._rates(x.flatten(0, 1), segment, chunks)
        lr, momentum, decay = (r.view(len(hidden), -1, self.heads) for r in rates)
        y, state, _ = ops.neural_memory(
            self._unit(self.to_q(x)),
            self._unit(self.to_k(x)),
            self._heads(self.to_v(x)),
            lr,
            momentum,
            decay,
            state,
            init=self.initial_state(rows).weights,
            chunk_size=self.chunk_size,
            cu_seqlens=cu_seqlens,
            **self._options(),
        )
        return self.to_out(y.flatten(2).to(x.dtype) * F.silu(self.to_gate(x))), state

    @cached_property
    def clip_key(self) -> bytes:
        """The key of the fingerprints of clips: a digest of the gates' weights when first asked.

        It is the same in every process that has the same weights, and known to nobody who has not.
        Training does not change it while the process lives.
        """
        weights = self.to_rates.weight.detach().float().cpu().numpy().astype("<f4", copy=False)
        return hashlib.blake2b(weights.tobytes(), digest_size=32).digest()

    def read(
        self, hidden: Tensor, token_index: Tensor, state_index: Tensor, state: MemoryState
    ) -> Tensor:
        """Adds the gated read at the given tokens; other rows of ``hidden`` come back bit for bit.

        Arguments and result: :func:`mal_kernels.ops.aligned_residual_read`.
        """
        params = ReadParams(self.norm, self.to_q.weight, self.to_gate.weight, self.to_out.weight)
        return ops.aligned_residual_read(
            *(hidden, token_index, state_index, state, params),
            activation=self.activation,
            residual_norm=self.residual_norm,
            backend=self.backend,
        )

    def write(self, tokens: Tensor, cu_seqlens: Tensor, state: MemoryState) -> MemoryUpdate:
        """Writes ragged sequences of hidden states, one per row of ``state``.

        Args:
            tokens: ``[N, Dm]``, the sequences one after another.
            cu_seqlens: ``[R + 1]`` int64 offsets; an empty sequence leaves its row as it is.
            state: ``R`` rows.

        Returns:
            The next state and the surprise ``[1, N, H]``.
        """
        x = self._normed(tokens)
        rates = self._rates(x, *self._segments(len(x), cu_seqlens))
        lr, momentum, decay = (r.unsqueeze(0) for r in rates)
        return ops.memory_update(
            self._unit(self.to_k(x)).unsqueeze(0),
            self._heads(self.to_v(x)).unsqueeze(0),
            lr,
            momentum,
            decay,
            state,
            init=self.initial_state(state.batch_size).weights,
            chunk_size=self.chunk_size,
            cu_seqlens=cu_seqlens,
            **self._options(),
        )

    def rates(self, tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gates with which :meth:`write` writes ``tokens`` ``[N, Dm]``.

        Returns:
            ``lr`` ``[N, H]``, and ``momentum`` and ``decay``, ``[N, H]`` or one row per chunk.
        """
        x = self._normed(tokens)
        return self._rates(x, *self._segments(len(x), cu_seqlens))

    def _options(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "activation": self.activation,
            "residual_norm": self.residual_norm,
            "max_grad_norm": self.max_grad_norm,
            "backend": self.backend,
        }

    def _normed(self, hidden: Tensor) -> Tensor:
        x = hidden.to(self.norm.dtype)
        return F.rms_norm(x, x.shape[-1:], self.norm, RMS_NORM_EPS)

    def _unit(self, x: Tensor) -> Tensor:
        """Per head, on the unit sphere: the write is bounded for unit keys only."""
        return F.normalize(self._heads(x), dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))

    def _rates(self, x: Tensor, segment: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """lr ``[N, H]``, momentum and decay ``[N, H]``, or ``[n, H]`` with chunk steps.

        ``x`` ``[N, Dm]``; ``segment`` ``[N]`` is the chunk, of ``n``, that each token belongs to.
        """
        lr, *rest = self.to_rates(x).unflatten(-1, (3, self.heads)).unbind(-2)
        lr = self.max_lr * lr.sigmoid()
        if self.step == "chunk":
            count = x.new_zeros(n, 1).index_add(0, segment, x.new_ones(len(x), 1)).clamp(min=1)
            lr = lr / count[segment]
            rest = [r.new_zeros(n, self.heads).index_add(0, segment, r) / count for r in rest]
        momentum, decay = (r.sigmoid() for r in rest)
        return lr, momentum, decay

    def _segments(self, tokens: int, cu_seqlens: Tensor) -> tuple[Tensor, int]:
        """Ragged: the chunk of each token, counted over all sequences, and the number of chunks."""
        token = torch.arange(tokens, device=cu_seqlens.device)
        row = torch.bucketize(token, cu_seqlens[1:], right=True)
        if self.chunk_size is None or self.step == "token":
            return row, len(cu_seqlens) - 1
        chunks = chunk_counts(cu_seqlens.diff(), self.chunk_size)
        first = chunks.cumsum(0) - chunks
        return first[row] + (token - cu_seqlens[row]) // self.chunk_size, int(chunks.sum())

    def _segments_of_rows(self, hidden: Tensor) -> tuple[Tensor, int]:
        """Lays out rows of one length, ``[B, T, Dm]``, whose numbers the CPU knows."""
        batch, tokens = hidden.shape[:2]
        size = self.chunk_size or max(tokens, 1)
        per_row = n_chunks(tokens, self.chunk_size)
        position = torch.arange(tokens, device=hidden.device)
        row = torch.arange(batch, device=hidden.device).unsqueeze(1)
        return (row * per_row + position // size).flatten(), batch * per_row

    def extra_repr(self) -> str:
        """Says what ``print(module)`` adds."""
        return f"heads={self.heads}, head_dim={self.head_dim}, step={self.step!r}"


class Clips(NamedTuple):
    """Sequences of tokens in hidden states ``[..., Dm]``, each with the memory that it belongs to.

    Args:
        places: ``[N]`` int64, flat positions of the tokens, one sequence after the other.
        cu_seqlens: ``[C + 1]`` int64, where each sequence begins and ends in ``places``.
        rows: ``[C]`` int64, the row of a state for each sequence.
    """

    places: Tensor
    cu_seqlens: Tensor
    rows: Tensor

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, rows: Tensor) -> Clips:
        """Sequences of adjacent tokens, from the first position and the length of each, ``[C]``."""
        ends = lengths.cumsum(0)
        shift = (starts - ends + lengths).repeat_interleave(lengths)  # [N]
        places = shift + torch.arange(len(shift), device=shift.device)
        return cls(places, F.pad(ends, (1, 0)), rows)

    def tokens(self, hidden: Tensor) -> Tensor:
        """The tokens ``[N, Dm]``."""
        return rearrange(hidden, "... d -> (...) d").index_select(0, self.places)

    def to(self, device: torch.device) -> Clips:
        """Returns the sequences on ``device``."""
        return Clips(*(x.to(device) for x in self))


class Written(NamedTuple):
    """The result of :func:`write_rows`.

    Args:
        state: with the rows that were written.
        surprise: ``[N, H]`` of the tokens that were written.
        kept: ``[C]`` bool, on the CPU: which sequences were written.
    """

    state: MemoryState
    surprise: Tensor
    kept: Tensor


def recall(
    memory: NeuralMemory,
    hidden: Tensor,
    clips: Clips,
    state: MemoryState,
    *,
    to_write: Clips | None = None,
    max_norm: float | None = None,
) -> tuple[Tensor, Written]:
    """One turn: each clip reads its memory, and is written to it afterwards as it came.

    So a turn recalls the turns before it and never itself. A dialogue is a loop over this function,
    and a speaker is a row of the state.

    Args:
        memory: reads and writes.
        hidden: ``[..., Dm]``.
        clips: the tokens that read, each of them once.
        state: one row per memory.
        to_write: the tokens that are written, if not ``clips``; at most one sequence per row.
        max_norm: as :func:`write_rows` takes it.

    Returns:
        ``hidden`` with the gated read at the tokens of ``clips``, and what was written.
    """
    to_write = to_write or clips
    lengths, total = clips.cu_seqlens.diff(), len(clips.places)
    row = clips.rows.repeat_interleave(lengths, output_size=total)  # [N]
    changed = memory.read(hidden, clips.places, row, state)
    tokens = to_write.tokens(hidden)
    return changed, write_rows(
        memory, tokens, to_write.cu_seqlens, to_write.rows, state, max_norm=max_norm
    )


def write_rows(
    memory: NeuralMemory,
    tokens: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor,
    state: MemoryState,
    *,
    max_norm: float | None = None,
) -> Written:
    """Writes sequences to some rows of ``state``; the chunk of each ends with it.

    Args:
        memory: writes.
        tokens: ``[N, Dm]``, the sequences one after another.
        cu_seqlens: ``[C + 1]`` int64.
        rows: ``[C]`` int64, the row that each sequence is written to, every row at most once.
        state: one row per memory, at a chunk boundary.
        max_norm: a sequence that is not finite, or that takes the norm of a head to this bound, is
            left out: left in, one bad row would turn the gradients of all to NaN. ``None`` writes
            all of them and does not wait for the device.
    """
    kept = torch.ones(len(rows), dtype=torch.bool)
    if max_norm is not None and len(rows):
        not_finite = F.pad((~tokens.isfinite().all(1)).cumsum(0), (1, 0))  # [N + 1], so far
        kept = (not_finite[cu_seqlens].diff() == 0).cpu()
    while kept.any():
        some, ends, into = _only(kept, tokens, cu_seqlens, rows)
        whole = _is_every_row(into, state)
        before = state if whole else state.index_select(into)
        new, surprise = memory.write(some, ends, before)
        bounded = torch.ones(len(into), dtype=torch.bool)
        if max_norm is not None:  # false for NaN, and with no bound for infinity
            bounded = new.detach().is_below(max_norm)
        if bounded.all():
            new = new.end_chunk()
            return Written(new if whole else _put(state, into, new), surprise[0], kept)
        kept[kept.clone()] = bounded
    return Written(state, tokens.new_zeros(0, memory.heads), kept)


def _is_every_row(rows: Tensor, state: MemoryState) -> bool:
    """Whether ``rows`` are all rows in order; elsewhere than on a CPU nobody waits to know it."""
    count = state.batch_size
    return rows.device.type == "cpu" and len(rows) == count and rows.tolist() == [*range(count)]


def _checked_lengths(lengths: Tensor, cu_seqlens: Tensor | None, hidden: Tensor) -> Tensor:
    """``lengths`` of the rows of ``hidden`` ``[B, T, Dm]``, or ArgumentError."""
    batch, tokens = hidden.shape[:2]
    expect(cu_seqlens is None, "lengths", "given with cu_seqlens", "one of them")
    expect(
        isinstance(lengths, Tensor)
        and lengths.shape == (batch,)
        and lengths.dtype in (torch.int32, torch.int64)
        and lengths.device == hidden.device,
        "lengths",
        lengths,
        f"int32 or int64 [{batch}] on {hidden.device}",
    )
    # the number of tokens has to be known here in any case
    counts = lengths.tolist()
    fit = all(0 <= n <= tokens for n in counts)
    expect(fit, "lengths", str(counts)[:80], f"numbers from 0 to T = {tokens}")
    return lengths.long()


def _only(
    keep: Tensor, tokens: Tensor, cu_seqlens: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences that are to be kept, bool ``[C]``."""
    if keep.all():
        return tokens, cu_seqlens, rows
    keep, lengths = keep.to(tokens.device), cu_seqlens.diff()
    ends = F.pad(lengths[keep].cumsum(0), (1, 0))
    return tokens[keep.repeat_interleave(lengths)], ends, rows[keep]


def _put(state: MemoryState, rows: Tensor, new: MemoryState) -> MemoryState:
    """``state`` with its ``rows`` replaced by ``new``, differentiable in both."""
    weights, momentum = (
        tuple(old.index_copy(0, rows, value) for old, value in zip(*layers, strict=True))
        for layers in zip(state[:2], new[:2], strict=True)
    )
    return MemoryState(weights, momentum)
