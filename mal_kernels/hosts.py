"""Where a host model keeps its audio tokens and decoder layers, one :class:`HostSpec` per type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .errors import ArgumentError, HostError

# what the ModuleList of decoder layers is called
LAYERS = ("layers", "h")
# subtrees that also hold one, but not that of the language model
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
    return max(found, key=lambda module: len(_layers(module)))


def _layers(decoder: nn.Module) -> nn.ModuleList:
    name = next(name for name in LAYERS if hasattr(decoder, name))
    return cast(nn.ModuleList, getattr(decoder, name))


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


def final_layer(decoder: nn.Module) -> int:
    """The last decoder layer: where every position is audio, each answers for itself."""
    return len(_layers(decoder)) - 1


# --- what is heard of each clip ---------------------------------------------------------------


def one_per_clip(inputs: Mapping[str, Any], spec: HostSpec, tokens: Sequence[int]) -> Sequence[Any]:
    """Audio arguments with an entry per clip, in order."""
    return cast(Sequence[Any], inputs[spec.audio_inputs[0]])


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
    heard = codes.flatten(0, 1) if mask is None else codes[mask.bool()]  # [N, codebooks]
    return torch.split(heard, list(tokens)) if len(heard) == sum(tokens) else ()


# --- which positions of an encoder's output are not padding ---------------------------------------


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
        audio_inputs: arguments of ``forward`` that carry audio; the first says what is heard.
        audio_token: path of the audio token id inside ``config``, or of several; ``None`` for a
            language model that is given audio as ``inputs_embeds``, under
            :meth:`MALAdapter.audio_mask`.
        root: path of the part that hears and answers, if it is not the whole model.
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
        features: returns what is heard of each clip, in order, from the arguments of a call, the
            spec and the number of tokens of each clip.
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
    width: str | None = None
    recognise: Callable[[nn.Module], bool] | None = None


_SPECS: dict[str, HostSpec] = {}


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
    _SPECS.pop(spec.model_type, None)
    _SPECS[spec.model_type] = spec  # the last one


def _has(path: str) -> Callable[[nn.Module], bool]:
    """Whether a model has a submodule at ``path``."""
    return lambda model: any(name == path for name, _ in model.named_modules())


_streaming = partial(
    HostSpec, audio_token=None, streaming=True, last_layer=final_layer, min_clip_tokens=1
)
_encoder = partial(HostSpec, audio_token=None, encoder="model.encoder")
_projector = partial(HostSpec, audio_token=None)

for _spec in (
    # text models, that are told where audio is
    *(
        HostSpec(name, audio_inputs=(), audio_token=None)
        for name in ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
    ),
    HostSpec("qwen2_audio"),
    HostSpec("audioflamingo3"),
    HostSpec("musicflamingo"),
    HostSpec("voxtral"),
    HostSpec("glmasr"),
    HostSpec("granite_speech"),
    HostSpec("granite_speech_plus"),
    HostSpec("qwen2_5_omni", root="thinker"),
    HostSpec("qwen2_5_omni_thinker"),
    HostSpec("qwen3_omni_moe", root="thinker"),
    HostSpec("qwen3_omni_moe_thinker"),
    HostSpec("qwen3_asr"),
    HostSpec("fun_asr_nano"),
    HostSpec("vibevoice_asr", audio_inputs=("input_values",)),
    HostSpec("moss_transcribe_diarize"),
    HostSpec("dots3_note"),
    HostSpec("inkling_mm_model", audio_inputs=("audio_input_ids",)),
    HostSpec("muse_spark", audio_inputs=("input_values",)),
    HostSpec("gemma3n", stream="altup_active_idx"),
    HostSpec("gemma4"),
    HostSpec("gemma4_unified"),
    HostSpec(
        "phi4_multimodal",
        audio_inputs=("audio_input_features",),
        audio_token="audio_config.audio_token_id",
        embeds_inside=True,
    ),
    HostSpec("nemo_speechlm"),  # Nemotron 3.5 Transcribe
    HostSpec("nemotron_h_omni"),
    # speech is what they answer with; the speech that they are given is what is remembered
    HostSpec("vibevoice", audio_inputs=("input_values",)),
    HostSpec("csm", audio_inputs=("input_values",), features=cut_at_samples),
    HostSpec(
        "higgs_audio_v2",
        audio_inputs=("audio_input_ids",),
        audio_token=("audio_token_id", "audio_delay_token_id"),
        embeds_inside=True,
        features=cut_at_frames,
    ),
    # every position is audio
    _streaming("voxtral_realtime", audio_inputs=("input_features", "encoder_inputs_embeds")),
    _streaming(
        "kyutai_speech_to_text",
        audio_inputs=("input_ids",),  # [R, S, 1 + codebooks]
        embeds_inside=True,
    ),
    _streaming("moshi", audio_inputs=("inputs_embeds", "user_audio_codes", "user_input_values")),
    # text attends to an encoder
    _encoder("whisper"),
    _encoder("moonshine", audio_inputs=("input_values",)),
    _encoder("moonshine_streaming", audio_inputs=("input_values",)),
    _encoder("canary"),
    _encoder("cohere_asr"),
    _encoder("speech_to_text", encoder_mask=frame_mask),
    _encoder("seamless_m4t", encoder="speech_encoder", encoder_mask=frame_mask),
    _encoder("seamless_m4t_v2", encoder="speech_encoder", encoder_mask=frame_mask),
    # not in transformers: nothing but the values of the embeddings says where their audio is
    _projector("ultravox", audio_inputs=("audio_values",), projector="multi_modal_projector"),
    _projector(
        "salmonn",
        audio_inputs=("spectrogram",),
        projector="speech_llama_proj",
        recognise=_has("speech_llama_proj"),
    ),
    _projector("salmonn_2", audio_inputs=("audio_features",), projector="connector"),
    _projector(
        "ltu",  # and LTU-AS
        audio_inputs=("audio_input",),
        projector="model.audio_proj",
        embeds_inside=True,
        recognise=_has("model.audio_proj"),
    ),
    _projector(
        "qwen_audio",
        audio_inputs=("audio_info",),
        projector="transformer.audio.proj",
        embeds_inside=True,
        recognise=_has("transformer.audio.proj"),
    ),
    _encoder(
        "audio_flamingo",
        audio_inputs=("audio_x",),
        encoder="audio_transformer",
        encoder_mask=window_mask,
        width="audio_embed_dim",
        recognise=_has("audio_transformer"),
    ),
    _encoder(
        "audio_flamingo_2",
        audio_inputs=("audio_x",),
        encoder="audio_transformer_clap",
        encoder_mask=window_mask,
        width="clap_embed_dim",
        recognise=_has("audio_transformer_clap"),
    ),
):
    register_host(_spec)


# --- one host -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A model together with what its spec found in it.

    ``model`` is the part of the ``whole`` that hears and answers, mostly all of it; ``decoder`` is
    the encoder, where text attends to one.
    """

    whole: nn.Module
    model: nn.Module
    spec: HostSpec
    decoder: nn.Module
    projector: nn.Module | None
    audio_tokens: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """Looks into ``model``; a ``PeftModel`` is looked through.

        Raises:
            HostError: unknown type of model, or it lacks what its spec says.
        """
        unwrap: Any = getattr(model, "get_base_model", None)
        whole = model if unwrap is None else unwrap()
        spec = _spec_of(whole)
        model = _part(whole, spec.root, "root") if spec.root else whole
        decoder = _part(model, spec.encoder, "encoder") if spec.encoder else spec.decoder(model)
        projector = _part(model, spec.projector, "projector") if spec.projector else None
        fields = spec.audio_token or ()
        tokens = {
            path: _look_up(getattr(model, "config", None), path)
            for path in ((fields,) if isinstance(fields, str) else fields)
        }
        for path, token in tokens.items():
            if not isinstance(token, int):
                raise HostError(
                    f"config.{path} of {type(model).__name__} is {token!r}; expected a token id. "
                    "Name the right field in HostSpec(audio_token=...)."
                )
        return cls(whole, model, spec, decoder, projector, tuple(tokens.values()))

    @property
    def hidden_size(self) -> int:
        """Width ``Dm`` of the decoder."""
        if self.spec.width is not None:
            return int(_look_up(self.model, self.spec.width))
        config: Any = self.decoder.config
        return int(config.hidden_size)

    def site(self, site: str | int) -> nn.Module:
        """The module to hook for ``MALConfig.site``.

        Raises:
            HostError: text cannot see the output of that layer.
        """
        if self.spec.encoder and site != "embeds":
            raise HostError(
                f"site={site}, but text in {type(self.model).__name__} attends to the output of an "
                "encoder; pass site='embeds', which is that output."
            )
        if self.spec.encoder:
            return self.decoder
        if site == "embeds":
            return _layers(self.decoder)[0] if self.spec.embeds_inside else self.decoder
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

    def edit_input(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], edit: Callable[[Tensor], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of the module at site ``embeds`` with the embeddings changed by ``edit``.

        ``None`` if there are no embeddings among them.
        """
        if self.spec.embeds_inside and args:
            return (edit(args[0]), *args[1:]), kwargs
        name = "hidden_states" if self.spec.embeds_inside else "inputs_embeds"
        embeds = kwargs.get(name)
        return None if embeds is None else (args, {**kwargs, name: edit(embeds)})

    def edit_output(self, output: Any, edit: Callable[[Tensor], Tensor]) -> Any:
        """The output of a layer or encoder with the hidden states changed by ``edit``."""
        if isinstance(output, Mapping):
            output.last_hidden_state = edit(output.last_hidden_state)  # type: ignore[attr-defined]
            return output
        if isinstance(output, tuple):
            return (self.edit_output(output[0], edit), *output[1:])
        if self.spec.stream is None:
            return edit(output)
        seen = _look_up(self.decoder.config, self.spec.stream)
        streams = list(output.unbind(0))
        streams[seen] = edit(streams[seen])
        return torch.stack(streams)

    def encoded(
        self, output: Any, inputs: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[dict[str, Any], Tensor]:
        """What an encoder returned, as a prompt ``[R, T]`` with the mask of its audio positions.

        ``inputs`` are the arguments of the call of the model.
        """
        hidden = output if isinstance(output, Tensor) else output[0]
        mask = getattr(output, "attention_mask", None)
        if mask is None:
            mask = self.spec.encoder_mask(self.model, hidden, inputs)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return {"inputs_embeds": hidden}, mask.bool()

    def arguments(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        function: Callable[..., Any] | None = None,
    ) -> Mapping[str, Any]:
        """The arguments of a call of the model's ``forward``, or another ``function``, by name."""
        if not args:
            return kwargs
        names = inspect.signature(function or self.model.forward).parameters
        return dict(zip(names, args, strict=False)) | dict(kwargs)

    def carries_audio(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call has audio to place; decided without looking at a tensor's values."""
        return any(inputs.get(name) is not None for name in self.spec.audio_inputs)

    def shape(self, inputs: Mapping[str, Any]) -> torch.Size | None:
        """``[R, S]`` of one call: rows and new positions."""
        for name in ("input_ids", "inputs_embeds", *self.spec.audio_inputs):
            given = inputs.get(name)
            if isinstance(given, Tensor) and given.dim() >= 2:
                return given.shape[:2]
        return None

    def batch(self, inputs: Mapping[str, Any]) -> int | None:
        """Rows of the batch that ``generate`` is given, also in a dictionary, if they are known."""
        names = ("inputs", "input_ids", "inputs_embeds", *self.spec.audio_inputs)
        every = [inputs, *(x for x in inputs.values() if isinstance(x, Mapping))]
        given = (mapping.get(name) for mapping in every for name in names)
        return next((len(x) for x in given if isinstance(x, (Tensor, list, tuple))), None)

    def prompted(self, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first call in a ``generate`` with what was ``given`` to that.

        Some hosts put audio among the embeddings before they call themselves. Where it is, is known
        by the prompt still.
        """
        ids, embeds = given.get("input_ids", given.get("inputs")), inputs.get("inputs_embeds")
        if inputs.get("input_ids") is not None or embeds is None or not isinstance(ids, Tensor):
            return inputs
        if ids.shape[1:] != embeds.shape[1:2] or len(embeds) % len(ids):
            return inputs
        return {**inputs, "input_ids": ids.repeat_interleave(len(embeds) // len(ids), 0)}

    def audio(self, inputs: Mapping[str, Any], mask: Tensor | None = None) -> Tensor:
        """Which positions ``[R, S]`` of one call are audio: those of ``mask`` ``[B, S]``, if given.

        Raises:
            HostError: they cannot be known, or ``mask`` is not the shape of the call.
        """
        ids, shape = inputs.get("input_ids"), self.shape(inputs)
        if self.spec.streaming and shape is not None:
            attention = inputs.get("attention_mask")
            if isinstance(attention, Tensor) and attention.dim() == 2:
                return attention[:, -shape[1] :].bool()
            return torch.ones(shape, dtype=torch.bool)
        if mask is None:
            if ids is None:
                raise HostError(
                    "input_ids is None in a call with audio, but audio tokens are found by their "
                    "id; pass input_ids instead of inputs_embeds, or say where the audio is with "
                    "audio_mask(mask), or use disable_adapter()."
                )
            return torch.stack([ids == token for token in self.audio_tokens]).any(0)
        if shape is None or shape[1] != mask.shape[1] or shape[0] % len(mask):
            raise HostError(
                f"mask is {list(mask.shape)} for a call of {list(shape or ())} rows and positions; "
                "open audio_mask(mask) with one value for each position of the prompt."
            )
        return mask.repeat_interleave(shape[0] // len(mask), 0)

    def clips(
        self, inputs: Mapping[str, Any], *, fingerprints: bool, mask: Tensor | None = None
    ) -> list[list[Clip]]:
        """The audio clips of every row of one call ``[R, S]``, in order of position.

        Runs of audio tokens that the attention mask hides are left out.

        Args:
            inputs: arguments of the call.
            fingerprints: whether to look at what is heard.
            mask: which positions are audio, if not those of the audio token.

        Raises:
            HostError: one placeholder per clip instead of one per audio token, or as :meth:`audio`.
        """
        runs, heard = _runs(self.audio(inputs, mask), inputs.get("attention_mask"))
        if mask is None and runs and all(b - a < self.spec.min_clip_tokens for _, a, b in runs):
            raise HostError(
                f"input_ids has {len(runs)} clips of one audio placeholder each; let the "
                "processor expand them to one placeholder per audio token."
            )
        prints: Sequence[int | None] = [None] * len(runs)
        if fingerprints and mask is None and not self.spec.streaming:
            features = self.spec.features(inputs, self.spec, [b - a for _, a, b in runs])
            if len(features) == len(runs):
                # clips of one length are hashed at once
                stacks = [features] if isinstance(features, Tensor) else [x[None] for x in features]
                prints = [mark for stack in stacks for mark in fingerprint(stack)]
        elif fingerprints and inputs.get("inputs_embeds") is not None:
            embeds = inputs["inputs_embeds"]
            prints = [fingerprint(embeds[r : r + 1, a:b])[0] for r, a, b in runs]
        shape = self.shape(inputs) or (0,)
        clips: list[list[Clip]] = [[] for _ in range(shape[0])]
        for (r, a, b), is_heard, mark in zip(runs, heard, prints, strict=True):
            if is_heard:
                clips[r].append(Clip(a, b, mark))
        return clips


def _runs(audio: Tensor, attention: Any) -> tuple[list[tuple[int, int, int]], list[bool]]:
    """Row, start and stop of every run in ``audio`` ``[R, S]``, and whether it may be attended."""
    edges = torch.nn.functional.pad(audio.int(), (1, 1)).diff(dim=1)  # [R, S+1]
    row, start = (edges == 1).nonzero(as_tuple=True)
    stop = (edges == -1).nonzero(as_tuple=True)[1]
    heard = torch.ones_like(row)
    if isinstance(attention, Tensor) and attention.dim() == 2:
        # with a cache the attention mask is longer than what is new
        heard = attention[:, -audio.shape[1] :].to(audio.device)[row, start] != 0
    # one transfer from the device
    table = torch.stack([row, start, stop, heard.to(row.dtype)], 1).tolist()
    return [(r, a, b) for r, a, b, _ in table], [bool(h) for *_, h in table]


def _look_up(config: Any, path: str) -> Any:
    """The value at a dotted ``path`` through objects and dictionaries, or ``None``."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return config


def _spec_of(model: Any) -> HostSpec:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model, nn.Module):
        for spec in reversed(_SPECS.values()):  # the last one registered counts
            same = spec.recognise(model) if spec.recognise else spec.model_type == model_type
            if same:
                return spec
    raise HostError(
        f"model is a {type(model).__name__} of model_type {model_type!r}; known hosts are "
        f"{sorted(_SPECS)}. Describe it with register_host(HostSpec(...))."
    )


def _part(model: nn.Module, path: str, field: str) -> nn.Module:
    """The submodule at ``path``, which ``HostSpec.field`` says there is."""
    try:
        return attrgetter(path)(model)
    except AttributeError:
        raise HostError(
            f"{type(model).__name__} has no {path!r}; name the right part in HostSpec({field}=...)."
        ) from None


def placed(embeds: Tensor, audio: Sequence[Tensor]) -> Tensor:
    """Which positions ``[R, S]`` of ``embeds`` ``[R, S, Dm]`` hold a vector of ``audio``.

    Vectors of each of ``audio``, ``[..., Dm]``, are the same bit for bit in the dtype of
    ``embeds``. Zeros are padding wherever they stand.
    """
    here = _hashes(embeds.flatten(0, 1))  # [R * S]
    rows = [x.to(embeds).flatten(0, -2) for x in audio]
    found = torch.isin(here, torch.cat([_hashes(x) for x in rows])) & (here != 0)
    return found.view(embeds.shape[:2])


def fingerprint(features: Tensor) -> list[int]:
    """A 64-bit hash of each entry of ``features`` ``[N, ...]``.

    Integer arithmetic modulo 2^64: the same on every device, in any order of summation, and only
    ``8 N`` bytes leave the device.
    """
    hashes: list[int] = _hashes(features.flatten(1)).tolist()
    return hashes


def _hashes(rows: Tensor) -> Tensor:
    """Hashes ``[N]`` of ``rows`` ``[N, K]``; 0 for one of zeros."""
    size = rows.element_size()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    words = rows.detach().contiguous().view(integer).long()
    # odd pseudo-random factors: a change of any single word changes the hash
    factor = torch.arange(1, words.shape[1] + 1, device=words.device) * -0x61C8864680B583EB
    factor = (factor ^ (factor >> 29)) * -0x40A7B892E31B1A47 | 1
    return (words * factor).sum(1)


BUILT_IN = frozenset(_SPECS)  # the types that come with the package
