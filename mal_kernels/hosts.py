"""Where a host model keeps its audio tokens and decoder layers, one :class:`HostSpec` per type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .errors import ArgumentError, HostError

# subtrees that also hold `layers`, but not those of the language model
NOT_THE_DECODER = ("audio", "vision", "visual", "image", "encoder", "talker", "codec", "tower")


class Clip(NamedTuple):
    """One run of audio tokens of a row: positions ``start..stop-1`` and a hash of what was heard.

    ``fingerprint`` is ``None`` where clips and audio features do not match one to one.
    """

    start: int
    stop: int
    fingerprint: int | None


# --- finding things in a model --------------------------------------------------------------------


def find_decoder(model: nn.Module) -> nn.Module:
    """The owner of the longest ModuleList ``layers`` outside audio, vision and talker subtrees.

    Module paths move between versions of transformers; this structure has not.

    Raises:
        HostError: there is none.
    """
    found = [
        module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList)
        and not any(word in part for part in path.split(".") for word in NOT_THE_DECODER)
    ]
    if not found:
        raise HostError(
            f"{type(model).__name__} has no ModuleList named 'layers' outside its encoders; "
            "register_host(HostSpec(..., decoder=...)) with a function that returns its decoder."
        )
    return max(found, key=lambda module: len(_layers(module)))


def _layers(decoder: nn.Module) -> nn.ModuleList:
    return cast(nn.ModuleList, decoder.layers)


def last_effective_layer(decoder: nn.Module) -> int:
    """The last decoder layer whose output still reaches text tokens.

    A change at audio positions reaches text only through a later layer that mixes positions and
    computes its own keys and values: not the MLP layers of a hybrid decoder, not the layers at the
    end of Gemma 3n and 4 that reuse earlier keys and values, and nothing follows the last layer.
    """
    config: Any = decoder.config
    n = len(_layers(decoder))
    kinds = getattr(config, "layers_block_type", None) or ["attention"] * n
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    mixing = [i for i in range(n - shared) if kinds[i] not in ("mlp", "moe")]
    return mixing[-1] - 1


@dataclass(frozen=True)
class HostSpec:
    """How to find audio in one type of host.

    Args:
        model_type: ``config.model_type`` of the host.
        audio_inputs: arguments of ``forward`` that carry audio; the first has an entry per clip.
        audio_token: path of the audio token id inside ``config``.
        decoder: returns the decoder, the module with ``layers`` and ``inputs_embeds``.
        last_layer: returns the last layer index at which a residual still has an effect.
        min_clip_tokens: a prompt in which all clips are shorter is taken for one that the processor
            did not expand.

    Example:
        >>> from mal_kernels import HostSpec, register_host
        >>> register_host(HostSpec("my_audio_llm", audio_inputs=("audio_values",)))
    """

    model_type: str
    audio_inputs: tuple[str, ...] = ("input_features",)
    audio_token: str = "audio_token_id"
    decoder: Callable[[nn.Module], nn.Module] = find_decoder
    last_layer: Callable[[nn.Module], int] = last_effective_layer
    min_clip_tokens: int = 2


_SPECS: dict[str, HostSpec] = {}


def register_host(spec: HostSpec) -> None:
    """Makes a type of host known, or replaces what is known about it. See :class:`HostSpec`.

    Raises:
        ArgumentError: ``spec`` is not a HostSpec.
    """
    if not isinstance(spec, HostSpec):
        raise ArgumentError(f"spec is {type(spec).__name__}; pass a HostSpec.")
    _SPECS[spec.model_type] = spec


register_host(HostSpec("qwen2_audio"))


# --- one host -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A model together with what its spec found in it."""

    model: nn.Module
    spec: HostSpec
    decoder: nn.Module
    audio_token_id: int

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """Looks into ``model``; a ``PeftModel`` is looked through.

        Raises:
            HostError: unknown type of model, or it lacks what its spec says.
        """
        unwrap: Any = getattr(model, "get_base_model", None)
        model = model if unwrap is None else unwrap()
        config: Any = getattr(model, "config", None)
        spec = _SPECS.get(getattr(config, "model_type", None) or "")
        if not isinstance(model, nn.Module) or spec is None:
            raise HostError(
                f"model is a {type(model).__name__} of model_type "
                f"{getattr(config, 'model_type', None)!r}; known hosts are {sorted(_SPECS)}. "
                "Describe it with register_host(HostSpec(...))."
            )
        try:
            token = attrgetter(spec.audio_token)(config)
        except AttributeError:
            token = None
        if not isinstance(token, int):
            raise HostError(
                f"config.{spec.audio_token} of {type(model).__name__} is {token!r}; expected a "
                "token id. Name the right field in HostSpec(audio_token=...)."
            )
        return cls(model, spec, spec.decoder(model), token)

    @property
    def hidden_size(self) -> int:
        """Width ``Dm`` of the decoder."""
        config: Any = self.decoder.config
        return int(config.hidden_size)

    def site(self, site: str | int) -> nn.Module:
        """The module to hook for ``MALConfig.site``.

        Raises:
            HostError: text cannot see the output of that layer.
        """
        if site == "embeds":
            return self.decoder
        last = self.spec.last_layer(self.decoder)
        if int(site) > last:
            raise HostError(
                f"site={site}, but in {type(self.model).__name__} with "
                f"{len(_layers(self.decoder))} layers nothing after layer {last} reaches the text; "
                f"pass site <= {last} or 'embeds'."
            )
        return _layers(self.decoder)[int(site)]

    def checkpoint_never(self, site: nn.Module) -> None:
        """Takes a hooked decoder layer out of gradient checkpointing.

        Before transformers 5.23 a checkpoint runs the hooks of a layer again in the backward pass.
        """
        if site is not self.decoder and getattr(site, "gradient_checkpointing", False):
            site.gradient_checkpointing = False  # type: ignore[assignment]

    def checkpoint_again(self, site: nn.Module) -> None:
        """Gives a decoder layer the setting of the others back."""
        if "gradient_checkpointing" in site.__dict__ and site is not self.decoder:
            other = next(layer for layer in _layers(self.decoder) if layer is not site)
            site.gradient_checkpointing = other.gradient_checkpointing

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of one call of the model, by name."""
        if not args:
            return kwargs
        names = inspect.signature(self.model.forward).parameters
        return dict(zip(names, args, strict=False)) | dict(kwargs)

    def carries_audio(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call has audio to place; decided without looking at a tensor's values."""
        return any(inputs.get(name) is not None for name in self.spec.audio_inputs)

    def clips(self, inputs: Mapping[str, Any], *, fingerprints: bool) -> list[list[Clip]]:
        """The audio clips of every row of ``input_ids`` ``[R, S]``, in order of position.

        Runs of audio tokens that the attention mask hides are left out.

        Raises:
            HostError: one placeholder per clip instead of one per audio token.
        """
        ids = inputs["input_ids"]
        edges = (ids == self.audio_token_id).int()
        edges = torch.nn.functional.pad(edges, (1, 1)).diff(dim=1)  # [R, S+1]
        row, start = (edges == 1).nonzero(as_tuple=True)
        stop = (edges == -1).nonzero(as_tuple=True)[1]
        heard = torch.ones_like(row)
        attention = inputs.get("attention_mask")
        if isinstance(attention, Tensor) and attention.dim() == 2:
            # with a cache the attention mask is longer than the new ids
            heard = attention[:, -ids.shape[1] :].to(ids.device)[row, start] != 0
        table = torch.stack([row, start, stop, heard.to(row.dtype)], 1).tolist()
        if table and all(b - a < self.spec.min_clip_tokens for _, a, b, _ in table):
            raise HostError(
                f"input_ids has {len(table)} clips of one audio placeholder each; let the "
                "processor expand them to one placeholder per audio token."
            )
        prints: Sequence[int | None] = [None] * len(table)
        features = inputs[self.spec.audio_inputs[0]]
        if fingerprints and len(features) == len(table):
            prints = fingerprint(features)
        clips: list[list[Clip]] = [[] for _ in range(ids.shape[0])]
        for (r, a, b, is_heard), mark in zip(table, prints, strict=True):
            if is_heard:
                clips[r].append(Clip(a, b, mark))
        return clips


def fingerprint(features: Tensor) -> list[int]:
    """A 64-bit hash of each entry of ``features`` ``[N, ...]``.

    Integer arithmetic modulo 2^64: the same on every device, in any order of summation, and only
    ``8 N`` bytes leave the device.
    """
    size = features.element_size()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    words = features.detach().contiguous().view(integer).flatten(1).long()
    # odd pseudo-random factors: a change of any single word changes the hash
    factor = torch.arange(1, words.shape[1] + 1, device=words.device) * -0x61C8864680B583EB
    factor = (factor ^ (factor >> 29)) * -0x40A7B892E31B1A47 | 1
    hashes: list[int] = (words * factor).sum(1).tolist()
    return hashes
