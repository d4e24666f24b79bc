"""The configuration of an adapter: a dataclass, saved as ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ArgumentError, CheckpointError

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
LIBRARY, VERSION = "mal_kernels", 1  # stand in every saved config
MEMORY_SHAPE = ("heads", "head_dim", "expansion", "depth", "activation", "residual_norm")
MEMORY_FIELDS = (
    *MEMORY_SHAPE,
    *("max_lr", "lr_init", "momentum_init", "decay_init", "max_grad_norm", "zero_start"),
)


@dataclass
class MALConfig:
    """A config says what a :class:`MALAdapter` is made of. The defaults are the measured ones.

    Args:
        site: ``"embeds"`` for the merged input embeddings of the decoder, or ``k`` for the output
            of decoder layer ``k``.
        heads: independent memories per dialogue.
        head_dim: width ``D`` of keys, values and queries of one head.
        expansion: hidden width of a memory network over ``D``.
        depth: layers of a memory network; 1 is linear.
        activation: one of ``gelu``, ``gelu_tanh``, ``silu``, ``relu``.
        residual_norm: whether the memory network is ``x + (1 + γ) ⊙ LayerNorm(mlp(x))``.
        max_lr: upper bound of the write rate θ; above .5 a deep memory can diverge.
        lr_init: initial write rate of each head, below ``max_lr``; ``None`` spreads them.
        momentum_init: initial momentum η of the writes, in (0, 1).
        decay_init: initial decay α toward the learned initial memory, in (0, 1).
        max_grad_norm: bound of each token's inner gradient; ``None`` for none.
        zero_start: a memory that nothing was written to reads exactly zero, so that the first turn
            of a dialogue is the frozen host's bit for bit, also after training: the last layer of
            the initial memory is zero and is not trained. Not with ``residual_norm``.
        max_state_norm: a turn that would take the Frobenius norm of a head's weights and momentum
            to this bound is not written; ``None`` for none.
        hidden_size: width ``Dm`` of the host; filled in when the adapter is attached.
        base_model_name_or_path: the host it was trained on; filled in when the adapter is attached.

    Raises:
        ArgumentError: a value is outside its range.

    Example:
        >>> from mal_kernels import MALConfig
        >>> MALConfig(heads=2, site=12).to_dict()["site"]
        12
    """

    site: str | int = "embeds"
    heads: int = 4
    head_dim: int = 64
    expansion: int = 2
    depth: int = 2
    activation: str = "gelu"
    residual_norm: bool = False
    max_lr: float = 0.5
    lr_init: tuple[float, ...] | None = None
    momentum_init: float = 0.01
    decay_init: float = 0.01
    max_grad_norm: float | None = 1.0
    zero_start: bool = False
    max_state_norm: float | None = 1e4
    hidden_size: int | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for name, (is_valid, expected) in _EXPECTED.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise ArgumentError(f"MALConfig.{name} is {value!r}; pass {expected}.")
        check_start(
            "MALConfig", self.heads, self.max_lr, self.lr_init, self.zero_start, self.residual_norm
        )
        if self.lr_init is not None:
            self.lr_init = tuple(self.lr_init)  # JSON has lists only

    def memory_options(self) -> dict[str, Any]:
        """The arguments of :class:`NeuralMemory`."""
        return {name: getattr(self, name) for name in MEMORY_FIELDS}

    def state_signature(self) -> dict[str, Any]:
        """The fields that a saved dialogue state depends on."""
        return {name: getattr(self, name) for name in ("site", "hidden_size", *MEMORY_SHAPE)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``adapter_config.json``."""
        return {"library": LIBRARY, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MALConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: not a config of this library and version, or an unknown or bad field.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(
                f"adapter config is a {type(values).__name__}; expected a JSON object as written "
                "by MALAdapter.save_pretrained."
            )
        values = dict(values)
        written_by = (values.pop("library", None), values.pop("version", None))
        if written_by != (LIBRARY, VERSION):
            raise CheckpointError(
                f"adapter config was written by (library, version) = {written_by}; expected "
                f"{(LIBRARY, VERSION)}. Load it with the library that wrote it."
            )
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise CheckpointError(
                f"adapter config has unknown keys {unknown}; remove them, or upgrade mal_kernels "
                "if a newer version wrote them."
            )
        try:
            return cls(**values)
        except ArgumentError as error:
            raise CheckpointError(f"adapter config is not valid: {error}") from error


def check_start(
    owner: str,
    heads: int,
    max_lr: float,
    lr_init: Sequence[float] | None,
    zero_start: bool,
    residual_norm: bool,
) -> None:
    """Whether a memory can start as it is told to, which several arguments of ``owner`` say.

    Raises:
        ArgumentError: ``lr_init`` does not fit ``heads`` and ``max_lr``, or ``zero_start`` does not
            go with ``residual_norm``.
    """
    if lr_init is not None and (
        len(lr_init) != heads or not all(_is_share(float(rate) / max_lr) for rate in lr_init)
    ):
        raise ArgumentError(
            f"{owner}.lr_init is {lr_init!r}; pass {heads} numbers, one per head, above 0 and "
            f"below max_lr={max_lr}."
        )
    if zero_start and residual_norm:
        raise ArgumentError(
            f"{owner}.zero_start is True; pass False with residual_norm=True, whose read is never "
            "zero."
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any, most: int = 4096) -> bool:
    return _is_int(value) and 0 < value <= most


def _is_positive(value: Any) -> bool:
    number = isinstance(value, float) or _is_int(value)
    return number and math.isfinite(value) and value > 0


def _is_share(value: Any) -> bool:
    # its logit is finite in float32
    return _is_positive(value) and 1e-30 <= value <= 1 - 1e-7


def _or_none(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "site": (
        lambda site: site == "embeds" or (_is_int(site) and site >= 0),
        "'embeds' or the index of a decoder layer",
    ),
    # bounded, so that a damaged file cannot ask for more than a machine has
    "heads": (_is_count, "an int from 1 to 4096"),
    "head_dim": (_is_count, "an int from 1 to 4096"),
    "expansion": (_is_count, "an int from 1 to 4096"),
    "depth": (lambda depth: _is_count(depth, 64), "an int from 1 to 64"),
    "activation": (lambda name: name in ACTIVATIONS, f"one of {ACTIVATIONS}"),
    "residual_norm": (lambda flag: isinstance(flag, bool), "True or False"),
    # with a decade of room below it for the rates that heads start with
    "max_lr": (
        lambda rate: _is_positive(rate) and 1e-30 <= rate <= 1e30,
        "a number from 1e-30 to 1e30",
    ),
    "lr_init": (
        _or_none(lambda rates: isinstance(rates, (list, tuple)) and all(map(_is_positive, rates))),
        "a tuple of positive numbers, one per head, or None to spread them",
    ),
    "momentum_init": (_is_share, "a number between 0 and 1, and no nearer to 1 than 1e-7"),
    "decay_init": (_is_share, "a number between 0 and 1, and no nearer to 1 than 1e-7"),
    "max_grad_norm": (
        _or_none(lambda norm: _is_positive(norm) and 1e-18 <= norm <= 1e18),
        "a number from 1e-18 to 1e18, or None for no bound",
    ),
    "zero_start": (lambda flag: isinstance(flag, bool), "True or False"),
    "max_state_norm": (_or_none(_is_positive), "a positive number, or None for no bound"),
    "hidden_size": (
        _or_none(lambda size: _is_count(size, 2**20)),
        "an int from 1 to 1048576, or None to take it from the host",
    ),
    "base_model_name_or_path": (_or_none(lambda name: isinstance(name, str)), "a name or None"),
}
