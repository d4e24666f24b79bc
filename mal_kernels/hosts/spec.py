"""Where one type of host model keeps its audio tokens and its decoder: :class:`HostSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, HostError

# what the ModuleList of decoder layers is called
LAYERS = ("layers", "h")


# subtrees that also hold one, but not that of the language model
NOT_THE_DECODER = ("audio", "vision", "visual", "image", "encoder", "talker", "codec", "tower")


def find_decoder(model: nn.Module) -> nn.Module:
    """The owner of the longest list of ``layers`` outside audio, vision and talker subtrees.

    Module paths move between versions of transformers; this structure has not.

    Raises:
        HostError: there is none.
    """
    found = [
        module
        for path, module in model.named_modules()
        if any(isinstance(getattr(module, name, None), nn.ModuleList) for name in LAYERS)
        and not any(word in part for part in path.split(".") for word in NOT_THE_DECODER)
    ]
    if not found:
        raise HostError(
            f"{type(model).__name__} has no ModuleList named 'layers' outside its encoders; "
            "register_host(HostSpec(..., decoder=...)) with a function that returns its decoder."
        )
    return max(found, key=lambda module: len(layers_of(module)))


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The list of layers of a decoder."""
    name = next(name for name in LAYERS if hasattr(decoder, name))
    return cast(nn.ModuleList, getattr(decoder, name))


def last_effective_layer(decoder: nn.Module) -> int:
    """The last decoder layer whose output still reaches text tokens.

    A change at audio positions reaches text only through a later layer that mixes positions and
    computes its own keys and values: not the MLP layers of a hybrid decoder, not the layers at the
    end of Gemma 3n and 4 that reuse earlier keys and values, and nothing follows the last layer.
    """
    config: Any = decoder.config
    n = len(layers_of(decoder))
    kinds = getattr(config, "layers_block_type", None) or ["attention"] * n
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    mixing = [i for i in range(n - shared) if kinds[i] not in ("mlp", "moe")]
    return mixing[-1] - 1


def final_layer(decoder: nn.Module) -> int:
    """The last decoder layer: where every position is audio, each answers for itself."""
    return len(layers_of(decoder)) - 1


def one_per_clip(inputs: Mapping[str, Any], spec: HostSpec, tokens: Sequence[int]) -> Sequence[Any]:
    """Audio arguments with an entry per clip, in order."""
    return cast(Sequence[Any], inputs[spec.audio_inputs[0]])


# arguments that say which frames or samples of the audio are no padding
MASKS = (
    *("feature_attention_mask", "input_features_mask", "audio_attention_mask", "audio_x_mask"),
    *("input_values_mask", "audio_input_ids_mask", "padding_mask"),
)


def named_mask(inputs: Mapping[str, Any], spec: HostSpec, features: Tensor) -> Tensor | None:
    """The argument that is called as masks of audio are; of an encoder also ``attention_mask``."""
    names = (*MASKS, "attention_mask") if spec.encoder else MASKS
    found = (inputs.get(name) for name in names)
    is_mask = (x for x in found if isinstance(x, Tensor) and x.dim() == 2)
    return next((mask for mask in is_mask if len(mask) == len(features)), None)


def mask_of_samples(inputs: Mapping[str, Any], spec: HostSpec, features: Tensor) -> Tensor | None:
    """``chunk_sample_lengths`` ``[N]`` of dots3, in frames of 160 samples."""
    frames = -(-inputs["chunk_sample_lengths"].to(features.device) // 160)
    return torch.arange(features.shape[-1], device=features.device) < frames[:, None]


def cut_at_samples(
    inputs: Mapping[str, Any], spec: HostSpec, tokens: Sequence[int]
) -> Sequence[Any]:
    """``input_values`` ``[B, C, T]`` of the clips of a row one after another, as CSM has them.

    ``input_values_cutoffs`` ``[B, clips]`` says where each ends; -1 where there is none.
    """
    pieces = []
    for row, ends in zip(inputs["input_values"], inputs["input_values_cutoffs"], strict=True):
        stops = [stop for stop in ends.tolist() if stop >= 0]
        pieces += [row[:, a:b] for a, b in pairwise([0, *stops])]
    return pieces


def cut_at_frames(
    inputs: Mapping[str, Any], spec: HostSpec, tokens: Sequence[int]
) -> Sequence[Any]:
    """``audio_input_ids`` ``[B, frames, codebooks]``: a frame for each token, row after row."""
    codes, mask = inputs["audio_input_ids"], inputs.get("audio_input_ids_mask")
    frames = codes.flatten(0, 1) if mask is None else codes[mask.bool()]  # [N, codebooks]
    return torch.split(frames, list(tokens)) if len(frames) == sum(tokens) else ()


def no_mask(model: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]) -> None:
    """None is padding."""


def window_mask(model: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
    """``audio_x_mask`` ``[B, L]`` of Audio Flamingo, each of its windows some positions long."""
    mask = inputs["audio_x_mask"].to(hidden.device)
    for dim in range(2):
        mask = mask.repeat_interleave(hidden.shape[dim] // mask.shape[dim], dim)
    return cast(Tensor, mask)


def frame_mask(model: Any, hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
    """``attention_mask`` ``[R, frames]`` of Speech2Text and SeamlessM4T, at the encoder's rate."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    encoder = model.get_encoder()
    if hasattr(encoder, "_get_feature_vector_attention_mask"):
        shorter = encoder._get_feature_vector_attention_mask(hidden.shape[1], mask)
        return cast(Tensor, shorter.to(hidden.device))
    lengths = model._compute_sub_sample_lengths_from_attention_mask(mask).to(hidden.device)
    return torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]


@dataclass(frozen=True)
class HostSpec:
    """How to find audio in one type of host.

    Args:
        model_type: ``config.model_type`` of the host, or any name if there is ``recognise``.
        audio_inputs: arguments of ``forward`` that carry audio; a clip is known again by the first.
        audio_token: path of the audio token id inside ``config``, or of several; ``None`` for a
            language model that is given audio as ``inputs_embeds``, under
            :meth:`MALAdapter.audio_mask`.
        root: path of the part that is prompted, if it is not the whole model.
        encoder: path of an encoder whose output text attends to. All of it is audio, a clip per
            row, and the only site; what follows is not looked at.
        encoder_mask: returns which positions ``[R, T]`` are not padding, or ``None`` for all, from
            the model, the output ``[R, T, Dm]`` of its encoder and the arguments of the call; for
            an encoder that does not return that.
        projector: path of the module that returns the embeddings of audio as they stand in the
            decoder's input afterwards. Where no argument says where that is, they are found there
            by their values.
        streaming: whether every position of every call is audio, also of text as it is generated.
            All calls of one ``generate`` are one clip then.
        decoder: returns the decoder, the module with ``layers`` and ``inputs_embeds``.
        embeds_inside: whether the decoder itself puts the audio into the embeddings. They are then
            changed where its first layer receives them.
        stream: path, inside the decoder's ``config``, of the index of the hidden states that
            attention sees, where layers return several ``[N, B, S, Dm]``.
        last_layer: returns the last layer index at which a residual still has an effect.
        min_clip_tokens: a prompt in which all clips are shorter is taken for one that the processor
            did not expand.
        features: returns the audio of each clip, in order, from the arguments of a call, the
            spec and the number of tokens of each clip. A clip that is longer than a window may be
            in several entries.
        mask: returns which frames ``[N, frames]`` of a tensor of features are not padding, or
            ``None`` for all, from the arguments of a call, the spec and the features.
        time: the dimension of those features in which their frames are.
        width: path, inside the model, of the width of a site that has no ``config``.
        recognise: tells whether a model is this host, if its ``model_type`` does not.

    Example:
        >>> from mal_kernels import HostSpec, register_host
        >>> register_host(HostSpec("my_audio_llm", audio_inputs=("audio_values",)))
    """

    model_type: str
    audio_inputs: tuple[str, ...] = ("input_features",)
    audio_token: str | tuple[str, ...] | None = "audio_token_id"
    root: str = ""
    encoder: str | None = None
    encoder_mask: Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor | None] = no_mask
    projector: str | None = None
    streaming: bool = False
    decoder: Callable[[nn.Module], nn.Module] = find_decoder
    embeds_inside: bool = False
    stream: str | None = None
    last_layer: Callable[[nn.Module], int] = last_effective_layer
    min_clip_tokens: int = 2
    features: Callable[[Mapping[str, Any], HostSpec, Sequence[int]], Sequence[Any]] = one_per_clip
    mask: Callable[[Mapping[str, Any], HostSpec, Tensor], Tensor | None] = named_mask
    time: int = 2
    width: str | None = None
    recognise: Callable[[nn.Module], bool] | None = None


SPECS: dict[str, HostSpec] = {}


def register_host(spec: HostSpec) -> None:
    """Makes a type of host known, or replaces what is known about it.

    Raises:
        ArgumentError: ``spec`` is not a HostSpec.

    Example:
        A model of your own, that is called with ``input_ids`` and ``input_features``, and whose
        processor writes the token ``config.sound.token`` once for each embedding of a clip:

        >>> from mal_kernels import HostSpec, MALAdapter, register_host
        >>> from mal_kernels.testing import tiny_host, tiny_inputs
        >>> model = tiny_host("voxtral")  # stands for it
        >>> model.config.model_type, model.config.sound = "my_model", {"token": 60}
        >>> register_host(HostSpec("my_model", audio_token="sound.token"))
        >>> mal = MALAdapter().attach(model)
    """
    if not isinstance(spec, HostSpec):
        raise ArgumentError(f"spec is {type(spec).__name__}; pass a HostSpec.")
    SPECS.pop(spec.model_type, None)
    SPECS[spec.model_type] = spec  # the last one


def spec_of(model: Any) -> HostSpec:
    """The spec that recognises ``model``; of several, the one registered last.

    Raises:
        HostError: there is none.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model, nn.Module):
        for spec in reversed(SPECS.values()):  # the last one registered counts
            same = spec.recognise(model) if spec.recognise else spec.model_type == model_type
            if same:
                return spec
    raise HostError(
        f"model is a {type(model).__name__} of model_type {model_type!r}; known hosts are "
        f"{sorted(SPECS)}. Describe it with register_host(HostSpec(...))."
    )
