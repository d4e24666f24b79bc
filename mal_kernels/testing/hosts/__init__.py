"""Tiny random hosts, with weights that are made in a moment.

They are the real classes of transformers, or replicas of hosts that it does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn

from ...errors import ArgumentError, needs
from ...hosts import Host
from .audio import NoNoise
from .recipes import BEGIN, ENCODERS, END, RECIPES, STREAMING, Recipe
from .replicas import REPLICAS


def tiny_host(name: str = "qwen2_audio", *, seed: int = 0, **overrides: Any) -> Any:
    """A host with a tiny random configuration, in eval mode.

    Args:
        name: of its :class:`HostSpec`, mostly ``config.model_type``: a key of ``RECIPES``,
            ``ENCODERS``, ``STREAMING`` or ``REPLICAS``.
        seed: of its weights.
        overrides: fields of the text configuration, such as ``num_hidden_layers``.

    Raises:
        ArgumentError: there is no tiny host of that name, or transformers is too old for it.
        MissingPackage: transformers is not installed.

    Example:
        >>> from mal_kernels.testing import tiny_host
        >>> type(tiny_host("voxtral")).__name__
        'VoxtralForConditionalGeneration'
    """
    with needs("hf", "a tiny host"):
        import transformers

    recipes = {**RECIPES, **ENCODERS, **STREAMING}
    if name not in {**recipes, **REPLICAS}:
        known = sorted({**recipes, **REPLICAS})
        raise ArgumentError(f"name is {name!r}; tiny hosts exist for {known}.")
    if name in recipes and not hasattr(transformers, recipes[name].model):
        raise ArgumentError(
            f"name is {name!r}, but transformers {transformers.__version__} has no "
            f"{recipes[name].model}; install a newer one."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in REPLICAS:
            return REPLICAS[name](**overrides).eval()
        host = _real_host(recipes[name], overrides)
    answers: Any = Host.of(host).model
    answers.generation_config.update(pad_token_id=0, eos_token_id=None, max_new_tokens=4)
    if name == "vibevoice":
        answers.generation_config.noise_scheduler = NoNoise()
    return host.eval()


def cache_name(host: nn.Module) -> str:
    """Returns the name of the key-value cache of ``host``, as an argument and in an output.

    transformers 5.24 renamed ``past_key_values`` to ``cache``, and warns about the old name.
    """
    return "cache" if "cache" in signature(host.forward).parameters else "past_key_values"


def _real_host(recipe: Recipe, overrides: Mapping[str, Any]) -> Any:
    import transformers

    config = _with(recipe.config, recipe.text, overrides)
    host_class = getattr(transformers, recipe.model)
    whole = transformers.AutoModel.from_config

    def part(config: Any, **kwargs: Any) -> Any:
        # this vision tower needs timm, and a prompt without images does not need it
        unseen = config.model_type == "gemma3n_vision"
        return nn.Identity() if unseen else whole(config, **kwargs)

    with patch.object(transformers.AutoModel, "from_config", part):
        return host_class(host_class.config_class(**config))


def _with(config: Mapping[str, Any], path: Sequence[str], fields: Mapping[str, Any]) -> Any:
    """A copy of nested ``config`` with ``fields`` set at ``path``."""
    if not path:
        return {**config, **fields}
    return {**config, path[0]: _with(config[path[0]], path[1:], fields)}


def tiny_inputs(
    host: Any, clips: Sequence[Sequence[int]], *, seed: int = 0, side: str = "left"
) -> dict[str, Any]:
    """A prompt for :func:`tiny_host`: text around clips, padded to one length.

    Args:
        host: what the prompt is for.
        clips: audio tokens (1 to 10) of every clip, for each row; a host whose clips all have the
            same number of tokens keeps to that.
        seed: of text and audio; the same seed and place in the batch give the same clip.
        side: where rows are padded.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[B, S]``; unless no row has a clip, also the audio
        arguments of the host, with ``N`` clips: for Qwen2-Audio ``input_features``
        ``[N, mels, frames]`` and ``feature_attention_mask`` ``[N, frames]``. Where text attends to
        an encoder, ``decoder_input_ids`` ``[B, 3]`` and the audio of the first clip of each row;
        for a streaming host what its ``generate`` takes, for a replica what it is called with.
    """
    generator = torch.Generator().manual_seed(seed)
    if type(host) in REPLICAS.values():
        return cast(dict[str, Any], host.prompt(clips, generator))
    name = host.config.model_type
    if name in RECIPES:
        return _prompt(host, RECIPES[name], clips, generator, side)
    recipe = {**ENCODERS, **STREAMING}[name]
    inputs = recipe.audio(torch.tensor([recipe.tokens or row[0] for row in clips]), generator)
    prompt = torch.randint(3, 50, (len(clips), 3), generator=generator)
    return {**inputs, "decoder_input_ids": prompt} if name in ENCODERS else inputs


def _prompt(
    host: Any,
    recipe: Recipe,
    clips: Sequence[Sequence[int]],
    generator: torch.Generator,
    side: str,
) -> dict[str, Any]:
    """Text around a placeholder for each audio token, and the audio."""
    audio = Host.of(host).audio_tokens[0]
    rows: list[list[int]] = []
    lengths: list[list[int]] = []  # of the clips of each row
    for row in clips:
        ids = [1, *torch.randint(3, 50, (2,), generator=generator).tolist()]
        lengths.append([recipe.tokens or tokens for tokens in row])
        for tokens in lengths[-1]:
            ids += [BEGIN, *[audio] * tokens, END]
        rows.append(ids + torch.randint(3, 50, (3,), generator=generator).tolist())
    width = max(map(len, rows))
    pad = [[0] * (width - len(ids)) for ids in rows]
    both = list(zip(rows, pad, strict=True))
    padded = torch.tensor([p + ids if side == "left" else ids + p for ids, p in both])
    inputs = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    if not any(lengths):
        return inputs
    if recipe.rows:
        most = max(map(len, lengths))
        heard = torch.tensor([row + [0] * (most - len(row)) for row in lengths])  # [B, C]
    else:
        heard = torch.tensor([tokens for row in lengths for tokens in row])  # [N]
    return {**inputs, **recipe.audio(heard, generator)}
