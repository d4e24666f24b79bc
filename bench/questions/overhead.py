"""Narrow random hosts of the real classes, their prompts, and what the memory adds to them.

A narrow host has an eighth of the width of the published model and a quarter of its layers, with
its attention layout; its audio tower likewise, on the same 30 s windows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.interleaved import in_pairs, quantiles
from mal_kernels import MALAdapter
from mal_kernels.testing import cache_name
from mal_kernels.testing.hosts.recipes import AUDIO, BEGIN, END, RECIPES

TURN = 112  # audio tokens of 4.5 s, all three hosts
TEXT = 20  # tokens of text around them
WINDOW = 3000  # mel frames that a Whisper tower is given, whatever the length of the clip
NARROW = ("qwen2_audio", "audioflamingo3", "qwen2_5_omni_thinker")
TITLES = dict(zip(NARROW, ("Qwen2-Audio", "Audio Flamingo 3", "Qwen2.5-Omni"), strict=True))
TOWER = {
    "num_mel_bins": 128,
    "d_model": 160,
    "encoder_layers": 8,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 640,
    "max_source_positions": WINDOW // 2,
}
COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
QWEN2_AUDIO: dict[str, Any] = {  # 4096 wide, 32 layers, as many heads for keys as for queries
    **COMMON,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
QWEN2_5: dict[str, Any] = {  # 3584 wide, 28 layers, 28 heads for queries and 4 for keys
    **COMMON,
    "hidden_size": 448,
    "intermediate_size": 2368,
    "num_hidden_layers": 7,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
}


def narrow_host(name: str, **text: Any) -> Any:
    """A random host of the real class, in eval mode; ``text`` overrides its decoder's sizes."""
    import transformers

    recipe = RECIPES[name]
    config = dict(recipe.config)
    decoder: dict[str, Any] = dict(QWEN2_AUDIO if name == "qwen2_audio" else QWEN2_5)
    tower = dict(TOWER)
    if name == "qwen2_5_omni_thinker":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
        decoder["rope_parameters"] = rope
        tower |= {"n_window": 100, "output_dim": QWEN2_5["hidden_size"]}
        config["vision_config"] |= {"out_hidden_size": decoder["hidden_size"]}
    config |= {"text_config": decoder | text, "audio_config": tower}
    host_class = getattr(transformers, recipe.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return host_class(host_class.config_class(**config)).eval()


def narrow_inputs(name: str, seed: int, frames: int = 4 * TURN) -> dict[str, Tensor]:
    """One prompt: a clip of :data:`TURN` tokens amid :data:`TEXT` tokens of text."""
    generator = torch.Generator().manual_seed(seed)
    width = frames if name == "qwen2_5_omni_thinker" else WINDOW
    mask = (torch.arange(width) < frames).long().unsqueeze(0)
    before = torch.randint(3, 50, (TEXT // 2 - 1,), generator=generator).tolist()
    after = torch.randint(3, 50, (TEXT // 2 - 1,), generator=generator).tolist()
    ids = torch.tensor([[*before, BEGIN, *[AUDIO] * TURN, END, *after]])
    mask_name = "input_features_mask" if name == "audioflamingo3" else "feature_attention_mask"
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(1, 128, width, generator=generator),
        mask_name: mask,
    }


def overhead(name: str, prefills: int, decodes: int) -> dict[str, Any]:
    """What an attached memory adds to a turn's first call, and to every token after it.

    Two hosts with the same weights, one of them with an adapter and an open dialogue, side by side.
    The audio tower is timed apart: its share depends on its size, not on the memory.
    """
    host = narrow_host(name)
    other = copy.deepcopy(host)
    mal = MALAdapter().attach(other)
    # two clips in turns: one that repeats the last turn would not be written
    prompts = [narrow_inputs(name, seed) for seed in (0, 1)]
    calls = {"host": 0, "memory": 0}

    def prefill(who: str, model: Any) -> Any:
        calls[who] += 1
        return model(**prompts[calls[who] % 2], use_cache=True, logits_to_keep=1)

    with torch.no_grad(), mal.dialogue("bench"), _tower_ms(host) as encoding:
        first = in_pairs(
            lambda: prefill("host", host), lambda: prefill("memory", other), rounds=prefills
        )
        encode = quantiles(encoding)
        if mal.last_turn is None or mal.last_turn.tokens != [TURN]:
            raise AssertionError(f"{name}: the turn was not heard")
        alone, remembering = (_decode(name, model, prompts[0]) for model in (host, other))
        after = in_pairs(alone, remembering, rounds=decodes)
    decoder_ms = first["base"]["median"] - encode["median"]
    return {
        "sizes": sizes(host),
        "prefill": first,
        "tower": encode,
        "decode": after,
        "share_of_call": first["added"]["median"] / first["base"]["median"],
        "share_of_prefill": first["added"]["median"] / decoder_ms,
        "share_of_decode": after["added"]["median"] / after["base"]["median"],
    }


@contextmanager
def _tower_ms(host: Any) -> Iterator[list[float]]:
    """Milliseconds of every call of the audio tower."""
    (tower,) = (m for name, m in host.named_modules() if name.split(".")[-1] == "audio_tower")
    starts, ms = [0.0], list[float]()

    def begin(*_: object) -> None:
        starts[0] = time.perf_counter()

    def end(*_: object) -> None:
        ms.append(1e3 * (time.perf_counter() - starts[0]))

    handles = tower.register_forward_pre_hook(begin), tower.register_forward_hook(end)
    yield ms
    for handle in handles:
        handle.remove()


def sizes(host: Any) -> dict[str, int]:
    """Of the decoder."""
    config = host.config.text_config
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in fields}


def _decode(name: str, model: Any, prompt: dict[str, Tensor]) -> Callable[[], None]:
    """One more token after ``prompt``; the cache is as long before each call."""
    cache = getattr(model(**prompt, use_cache=True), cache_name(model))
    length = prompt["input_ids"].shape[1]
    arguments = {
        "input_ids": prompt["input_ids"][:, -1:],
        "attention_mask": torch.ones(1, length + 1, dtype=torch.long),
    }
    if name == "qwen2_5_omni_thinker":  # where generate would put it: time, height, width
        arguments["position_ids"] = torch.full((3, 1, 1), length)

    def step() -> None:
        model(**arguments, **{cache_name(model): cache}, use_cache=True)
        cache.crop(-1)

    return step
