"""Tiny hosts hear random audio arguments of a chosen number of tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LONGEST = 10  # audio tokens of a clip


def frames(
    tokens: Tensor,
    generator: torch.Generator,
    *,
    per_token: int = 4,
    less: int = 0,
    bins: int = 8,
    width: int | None = None,
    time_first: bool = False,
    name: str = "input_features",
    mask: str | None = "input_features_mask",
    mask_dtype: torch.dtype = torch.long,
) -> dict[str, Any]:
    """A spectrogram ``[N, bins, frames]``, or ``[N, frames, bins]``, and the mask of its frames.

    A clip has ``per_token`` frames for each of its tokens, ``less`` a few.
    """
    length = tokens * per_token - less
    heard = length[:, None] > torch.arange(width or int(length.max()))  # [N, frames]
    features = torch.randn(len(tokens), bins, heard.shape[1], generator=generator) * heard[:, None]
    inputs: dict[str, Any] = {name: features.mT.contiguous() if time_first else features}
    return inputs if mask is None else {**inputs, mask: heard.to(mask_dtype)}


def granite(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """The mask is one of tokens, not of frames."""
    return frames(tokens, generator, per_token=2, time_first=True, mask=None) | {
        "input_features_mask": tokens[:, None] > torch.arange(int(tokens.max()))
    }


def moss(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Two masks: of frames, and of samples."""
    made = frames(tokens, generator, per_token=8, width=8 * LONGEST)
    return {**made, "padding_mask": made["input_features_mask"]}


def phi(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """The number of tokens is an argument of its own."""
    made = frames(
        tokens,
        generator,
        per_token=8,
        time_first=True,
        name="audio_input_features",
        mask="audio_attention_mask",
        mask_dtype=torch.bool,
    )
    return {**made, "audio_embed_sizes": tokens}


def dots(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Lengths are counted in samples."""
    made = frames(tokens, generator, per_token=8, mask=None)
    return {**made, "chunk_sample_lengths": tokens * 8 * 160}


def inkling(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Discrete spectrograms: one of 8 levels per bin."""
    mask = tokens[:, None] > torch.arange(int(tokens.max()))
    levels = torch.randint(8, (*mask.shape, 4), generator=generator)
    return {"audio_input_ids": levels * mask[..., None], "audio_input_ids_mask": mask.long()}


def vibevoice(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[N, 1, T]``."""
    return frames(tokens, generator, bins=1, name="input_values", mask="padding_mask")


def muse(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[N, T]``."""
    made = frames(tokens, generator, bins=1, name="input_values", mask="input_values_mask")
    return {**made, "input_values": made["input_values"][:, 0]}


def moonshine(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[N, T]``, 384 for a token and some more that three convolutions take."""
    width = 384 * int(tokens.max()) + 511
    made = frames(tokens, generator, per_token=384, bins=1, width=width, mask="attention_mask")
    return {"input_values": made["input_features"][:, 0], "attention_mask": made["attention_mask"]}


def moonshine_streaming(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[N, T]``, 320 for a token: two convolutions halve frames of 80."""
    made = frames(tokens, generator, per_token=320, bins=1, mask="attention_mask")
    return {"input_values": made["input_features"][:, 0], "attention_mask": made["attention_mask"]}


def realtime(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Audio that is added to the embeddings of a prompt ``[N, 2]`` and of what is generated."""
    prompt = torch.randint(3, 50, (len(tokens), 2), generator=generator)
    made = frames(tokens, generator, per_token=8, mask=None)
    return {"input_ids": prompt, "num_delay_tokens": 2, **made}


def kyutai(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[N, 1, T]``, 32 for a token."""
    return frames(tokens, generator, per_token=32, bins=1, name="input_values", mask=None)


def moshi(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Codes ``[N, 4, T]`` of both speakers and text ``[N, T]``, all of the longest length."""
    shape = (len(tokens), 4, int(tokens.max()))
    names = ("user_audio_codes", "moshi_audio_codes")
    codes = {name: torch.randint(16, shape, generator=generator) for name in names}
    text = torch.randint(3, 50, (shape[0], shape[2]), generator=generator)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), **codes}


def csm(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[B, 1, T]``, 32 for a token, of clips ``[B, C]``; and where each clip ends."""
    ends = 32 * tokens.cumsum(1)
    waves = torch.randn(len(tokens), 1, int(ends.max()), generator=generator)
    return {"input_values": waves, "input_values_cutoffs": ends.where(tokens > 0, -1)}


def higgs(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Codes ``[B, frames, 2]`` of clips ``[B, C]``, a frame for a token, and their mask."""
    frames = tokens.sum(1)
    mask = frames[:, None] > torch.arange(int(frames.max()))
    codes = torch.randint(14, (*mask.shape, 2), generator=generator)
    return {"audio_input_ids": codes * mask[..., None], "audio_input_ids_mask": mask}


class NoNoise:
    """A noise scheduler for VibeVoice, in the place of one of diffusers."""

    timesteps = torch.arange(2)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Has two steps whatever is asked for."""

    def step(self, prediction: Tensor, timestep: Tensor, sample: Tensor) -> SimpleNamespace:
        """Goes half of the way."""
        return SimpleNamespace(prev_sample=(sample + prediction) / 2)
