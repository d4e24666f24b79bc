"""Narrow random hosts of the real classes, and prompts for them: large enough to be timed.

A narrow host has an eighth of the width of the published model and a quarter of its layers, with
its attention layout; its audio tower likewise, on the same 30 s windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .recipes import AUDIO, BEGIN, END, RECIPES

TURN = 112  # audio tokens of 4.5 s, all three hosts
TEXT = 20  # tokens of text around them
WINDOW = 3000  # mel frames that a Whisper tower is given, whatever the length of the clip
FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
QWEN2_AUDIO = (512, 1376, 8, 4, 4)  # published: 4096 wide, 32 layers, as many heads for keys
QWEN2_5 = (448, 2368, 7, 7, 1)  # published: 3584 wide, 28 layers, 28 heads, 4 for keys
COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TOWER = {
    "num_mel_bins": 128,
    "d_model": 160,
    "encoder_layers": 8,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 640,
    "max_source_positions": WINDOW // 2,
}


def narrow_host(name: str, **text: Any) -> Any:
    """A random host of the real class, in eval mode; ``text`` overrides its decoder's sizes."""
    import transformers

    recipe = RECIPES[name]
    config = dict(recipe.config)
    sizes = QWEN2_AUDIO if name == "qwen2_audio" else QWEN2_5
    decoder: dict[str, Any] = {**COMMON} | dict(zip(FIELDS, sizes, strict=True))
    tower = dict(TOWER)
    if name == "qwen2_5_omni_thinker":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
        decoder["rope_parameters"] = rope
        tower |= {"n_window": 100, "output_dim": decoder["hidden_size"]}
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
