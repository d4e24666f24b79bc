"""One host model at run time: what its :class:`HostSpec` found in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HostError
from .clips import Clip, Frames, hash_frames, join, runs_of, windows_of
from .spec import HostSpec, layers_of, spec_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call: by place, and by name


@dataclass(frozen=True)
class Host:
    """A model together with what its spec found in it.

    ``model`` is the part of the ``whole`` that is prompted, mostly all of it; ``decoder`` is
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
        spec = spec_of(whole)
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
        if site == "embeds" and not self.spec.embeds_inside:
            return self.decoder  # which need not have layers
        layers = layers_of(self.decoder)
        if site == "embeds":
            return layers[0]
        last = self.spec.last_layer(self.decoder)
        if int(site) > last:
            raise HostError(
                f"site={site}, but in {type(self.model).__name__} with {len(layers)} layers "
                f"nothing after layer {last} reaches the text; pass site <= {last} or 'embeds'."
            )
        return layers[int(site)]

    def checkpoint_never(self, site: nn.Module) -> None:
        """Takes a hooked decoder layer out of gradient checkpointing.

        Before transformers 5.23 a checkpoint runs the hooks of a layer again in the backward pass.
        """
        if site is not self.decoder and getattr(site, "gradient_checkpointing", False):
            site.gradient_checkpointing = False  # type: ignore[assignment]

    def checkpoint_again(self, site: nn.Module) -> None:
        """Gives a decoder layer the setting of the others back."""
        if "gradient_checkpointing" in site.__dict__ and site is not self.decoder:
            other = next(layer for layer in layers_of(self.decoder) if layer is not site)
            site.gradient_checkpointing = other.gradient_checkpointing

    def embeds_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, Callable[[Tensor], Arguments]]:
        """The embeddings that the module at site ``embeds`` is called with, and how to put others.

        Returns:
            ``[R, S, Dm]``, or ``None`` if there are none, and a function that returns the arguments
            of the call with other embeddings in their place.
        """
        if self.spec.embeds_inside and args:
            return args[0], lambda embeds: ((embeds, *args[1:]), kwargs)
        name = "hidden_states" if self.spec.embeds_inside else "inputs_embeds"
        return kwargs.get(name), lambda embeds: (args, {**kwargs, name: embeds})

    def hidden_of(self, output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """The hidden states in the output of a layer or encoder, and how to put others.

        Returns:
            ``[R, S, Dm]``, and a function that returns the output with other hidden states in their
            place.
        """
        if isinstance(output, Mapping):

            def put(hidden: Tensor) -> Any:
                output.last_hidden_state = hidden  # type: ignore[attr-defined]
                return output

            return output.last_hidden_state, put  # type: ignore[attr-defined]
        if isinstance(output, tuple):
            hidden, put_first = self.hidden_of(output[0])
            return hidden, lambda hidden: (put_first(hidden), *output[1:])
        if self.spec.stream is None:
            return output, lambda hidden: hidden
        seen = _look_up(self.decoder.config, self.spec.stream)
        streams = list(output.unbind(0))
        before, after = streams[:seen], streams[seen + 1 :]
        return streams[seen], lambda hidden: torch.stack([*before, hidden, *after])

    def encoded(
        self, output: Any, inputs: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[dict[str, Any], Tensor]:
        """Returns an encoder's output as a prompt ``[R, T]`` with the mask of its audio positions.

        ``inputs`` are the arguments of the call of the model, which stand in the prompt as
        ``heard``: a clip is known again by what the encoder was given.
        """
        hidden = output if isinstance(output, Tensor) else output[0]
        mask = getattr(output, "attention_mask", None)
        if mask is None:
            mask = self.spec.encoder_mask(self.model, hidden, inputs)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return {"inputs_embeds": hidden, "heard": inputs}, mask.bool()

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
        self,
        inputs: Mapping[str, Any],
        *,
        fingerprints: bool,
        mask: Tensor | None = None,
        key: bytes = b"",
    ) -> list[list[Clip]]:
        """The audio clips of every row of one call ``[R, S]``, in order of position.

        Runs of audio tokens that the attention mask hides are left out.

        Args:
            inputs: arguments of the call.
            fingerprints: whether to hash the audio of each clip.
            mask: which positions are audio, if not those of the audio token.
            key: of the hash.

        Raises:
            HostError: one placeholder per clip instead of one per audio token, or as :meth:`audio`.
        """
        runs, attended = runs_of(self.audio(inputs, mask), inputs.get("attention_mask"))
        if mask is None and runs and all(b - a < self.spec.min_clip_tokens for _, a, b in runs):
            raise HostError(
                f"input_ids has {len(runs)} clips of one audio placeholder each; let the "
                "processor expand them to one placeholder per audio token."
            )
        prints: Sequence[int | None] = [None] * len(runs)
        parts = self._heard(inputs, runs, mask, key) if fingerprints and runs else None
        if parts is not None:
            prints = [join(entries, key) for entries in parts]
        shape = self.shape(inputs) or (0,)
        clips: list[list[Clip]] = [[] for _ in range(shape[0])]
        for (r, a, b), is_attended, mark in zip(runs, attended, prints, strict=True):
            if is_attended:
                clips[r].append(Clip(a, b, mark))
        return clips

    def _heard(
        self,
        inputs: Mapping[str, Any],
        runs: Sequence[tuple[int, int, int]],
        mask: Tensor | None,
        key: bytes,
    ) -> Sequence[Sequence[Frames]] | None:
        """The hashed frames of each of ``runs``, or ``None`` where they cannot be told apart."""
        spec, embeds = self.spec, inputs.get("inputs_embeds")
        lengths = [b - a for _, a, b in runs]
        if spec.encoder and embeds is not None:
            given = self._entries(inputs.get("heard", {}), lengths, key)
            if len(given) == len(embeds):  # not so where the host repeats rows before it encodes
                return [[given[r]] for r, _, _ in runs]
        elif mask is None and not spec.streaming:
            return windows_of(self._entries(inputs, lengths, key), lengths)
        if embeds is None:
            return None
        # of all clips at once, which costs one transfer from the device
        spoken = torch.cat([embeds[r, a:b] for r, a, b in runs])[None]
        (frames,) = hash_frames(spoken, time=1, key=key)
        return [[part] for part in frames.split(lengths)]

    def _entries(
        self, inputs: Mapping[str, Any], lengths: Sequence[int], key: bytes
    ) -> Sequence[Frames]:
        """The hashed frames of the audio arguments of a call, an entry each."""
        spec, name = self.spec, self.spec.audio_inputs[0]
        if inputs.get(name) is None:  # generate may be given it by place
            inputs = {**inputs, name: inputs.get("inputs")}
        features = spec.features(inputs, spec, lengths)
        if isinstance(features, Tensor):
            return hash_frames(features, spec.mask(inputs, spec, features), time=spec.time, key=key)
        return [frames for x in features or () for frames in hash_frames(x[None], key=key)]


def _look_up(config: Any, path: str) -> Any:
    """The value at a dotted ``path`` through objects and dictionaries, or ``None``."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return config


def _part(model: nn.Module, path: str, field: str) -> nn.Module:
    """The submodule at ``path``, which ``HostSpec.field`` says there is."""
    try:
        return attrgetter(path)(model)
    except AttributeError:
        raise HostError(
            f"{type(model).__name__} has no {path!r}; name the right part in HostSpec({field}=...)."
        ) from None
