"""Tiny random hosts: the real classes of transformers, with weights that are made in a moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .hosts import Host

VOCABULARY, IMAGE, VIDEO, AUDIO, BEGIN, END = 64, 56, 57, 60, 61, 62
LONGEST = 10  # audio tokens of a clip


@dataclass(frozen=True)
class Recipe:
    """How to make one host and its audio.

    Args:
        model: class in transformers.
        config: arguments of its configuration class.
        audio: makes the audio arguments of ``N`` clips, from their numbers of tokens ``[N]``.
        text: where the arguments of the text model belong in ``config``.
        tokens: how many tokens every clip has, if the host leaves no choice.
    """

    model: str
    config: Mapping[str, Any]
    audio: Callable[[Tensor, torch.Generator], dict[str, Any]]
    text: tuple[str, ...] = ("text_config",)
    tokens: int | None = None


# --- audio ----------------------------------------------------------------------------------------


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


def granite_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """The mask is one of tokens, not of frames."""
    return frames(tokens, generator, per_token=2, time_first=True, mask=None) | {
        "input_features_mask": tokens[:, None] > torch.arange(int(tokens.max()))
    }


def moss_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Two masks: of frames, and of samples."""
    made = frames(tokens, generator, per_token=8, width=8 * LONGEST)
    return {**made, "padding_mask": made["input_features_mask"]}


def phi_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
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


def dots_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Lengths are counted in samples."""
    made = frames(tokens, generator, per_token=8, mask=None)
    return {**made, "chunk_sample_lengths": tokens * 8 * 160}


def inkling_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Discrete spectrograms: one of 8 levels per bin."""
    mask = tokens[:, None] > torch.arange(int(tokens.max()))
    levels = torch.randint(8, (*mask.shape, 4), generator=generator)
    return {"audio_input_ids": levels * mask[..., None], "audio_input_ids_mask": mask.long()}


def vibevoice_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[N, 1, T]``; without ``sample=False`` the host adds noise to what it hears."""
    made = frames(tokens, generator, bins=1, name="input_values", mask="padding_mask")
    return {**made, "sample": False}


def muse_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[N, T]``."""
    made = frames(tokens, generator, bins=1, name="input_values", mask="input_values_mask")
    return {**made, "input_values": made["input_values"][:, 0]}


def moonshine_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[N, T]``, 384 for a token and some more that three convolutions take."""
    width = 384 * int(tokens.max()) + 511
    made = frames(tokens, generator, per_token=384, bins=1, width=width, mask="attention_mask")
    return {"input_values": made["input_features"][:, 0], "attention_mask": made["attention_mask"]}


def realtime_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Audio that is added to the embeddings of a prompt ``[N, 2]`` and of what is generated."""
    prompt = torch.randint(3, 50, (len(tokens), 2), generator=generator)
    made = frames(tokens, generator, per_token=8, mask=None)
    return {"input_ids": prompt, "num_delay_tokens": 2, **made}


def kyutai_audio(tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Samples ``[N, 1, T]``, 32 for a token."""
    return frames(tokens, generator, per_token=32, bins=1, name="input_values", mask=None)


# --- configurations -------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TEXT_8 = {**TEXT, "head_dim": 8}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
NEMOTRON_H = {
    **{name: value for name, value in TEXT_8.items() if name != "num_hidden_layers"},
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}
WHISPER = {
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
}
WHISPER_40 = {**WHISPER, "max_source_positions": 2 * LONGEST}  # frames: two for each position
OMNI_TEXT = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
OMNI = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": AUDIO,
    "audio_start_token_id": BEGIN,
    "audio_end_token_id": END,
    "vision_start_token_id": 55,
}
OMNI_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
}
QWEN2_5_OMNI = {
    **OMNI,
    "text_config": OMNI_TEXT,
    "audio_config": {**WHISPER, "n_window": 20, "output_dim": 32},
    "vision_config": {**OMNI_VISION, "fullatt_block_indexes": [0]},
}
QWEN3_OMNI = {
    **OMNI,
    "text_config": {**OMNI_TEXT, **MOE, "head_dim": 8, "num_experts": 4},
    "audio_config": {**WHISPER_40, "output_dim": 32, "downsample_hidden_size": 4},
    "vision_config": {
        **OMNI_VISION,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
}
GRANITE: dict[str, Any] = {
    "audio_token_index": AUDIO,
    "has_lora_adapter": False,
    "text_config": TEXT,
    "encoder_config": {
        "input_dim": 8,
        "num_layers": 2,
        "hidden_dim": 16,
        "feedforward_mult": 2,
        "num_heads": 2,
        "output_dim": 4,
        "context_size": 8,
        "max_pos_emb": 16,
        "conv_kernel_size": 3,
    },
    "projector_config": {
        **SIZES,
        "num_hidden_layers": 1,
        "encoder_hidden_size": 16,
        "cross_attention_frequency": 1,
    },
    "downsample_rate": 2,
    "window_size": 2,
}
VIBEVOICE_ENCODER = {
    "hidden_size": 8,
    "num_filters": 4,
    "downsampling_ratios": [2, 2],
    "depths": [1, 1, 1],
}
GEMMA = {
    "audio_token_id": AUDIO,
    "image_token_id": IMAGE,
    "boi_token_id": 54,
    "eoi_token_id": 55,
    "boa_token_id": BEGIN,
}
GEMMA_TEXT = {
    **TEXT_8,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
GEMMA_PER_LAYER = {
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 4,
}
GEMMA_4 = {**GEMMA, "video_token_id": VIDEO, "eoa_token_index": END}
FRAMES_8 = partial(frames, per_token=8, width=8 * LONGEST)

RECIPES = {
    "qwen2_audio": Recipe(
        "Qwen2AudioForConditionalGeneration",
        {"audio_token_index": AUDIO, "text_config": TEXT, "audio_config": WHISPER_40},
        partial(frames, width=4 * LONGEST, mask="feature_attention_mask"),
    ),
    "audioflamingo3": Recipe(
        "AudioFlamingo3ForConditionalGeneration",
        {"audio_token_id": AUDIO, "text_config": TEXT, "audio_config": WHISPER_40},
        partial(frames, width=4 * LONGEST),
    ),
    "musicflamingo": Recipe(
        "MusicFlamingoForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "audio_bos_token_id": BEGIN,
            "audio_eos_token_id": END,
            "text_config": TEXT,
            "audio_config": {**WHISPER_40, "model_type": "audioflamingo3_encoder"},
        },
        partial(frames, width=4 * LONGEST),
    ),
    "voxtral": Recipe(
        "VoxtralForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "text_config": {**TEXT_8, "model_type": "llama"},
            "audio_config": {**WHISPER_40, "encoder_ffn_dim": 64},
        },
        partial(frames, per_token=8, width=4 * LONGEST, mask=None),
        tokens=5,
    ),
    "glmasr": Recipe(
        "GlmAsrForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "text_config": {**TEXT_8, "model_type": "llama"},
            "audio_config": {
                **SIZES,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_mel_bins": 8,
            },
        },
        FRAMES_8,
    ),
    "granite_speech": Recipe("GraniteSpeechForConditionalGeneration", GRANITE, granite_audio),
    "granite_speech_plus": Recipe(
        "GraniteSpeechPlusForConditionalGeneration",
        {
            **GRANITE,
            "encoder_config": {**GRANITE["encoder_config"], "cat_hidden_layers": [1]},
            "projector_config": {**GRANITE["projector_config"], "encoder_hidden_size": 32},
        },
        granite_audio,
    ),
    "qwen2_5_omni_thinker": Recipe(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        QWEN2_5_OMNI,
        partial(frames, mask="feature_attention_mask"),
    ),
    "qwen2_5_omni": Recipe(
        "Qwen2_5OmniForConditionalGeneration",
        {"thinker_config": QWEN2_5_OMNI, "enable_audio_output": False},
        partial(frames, mask="feature_attention_mask"),
        text=("thinker_config", "text_config"),
    ),
    "qwen3_omni_moe_thinker": Recipe(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        QWEN3_OMNI,
        partial(frames, per_token=8, mask="feature_attention_mask"),
    ),
    "qwen3_omni_moe": Recipe(
        "Qwen3OmniMoeForConditionalGeneration",
        {"thinker_config": QWEN3_OMNI, "enable_audio_output": False},
        partial(frames, per_token=8, mask="feature_attention_mask"),
        text=("thinker_config", "text_config"),
    ),
    "qwen3_asr": Recipe(
        "Qwen3ASRForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "timestamp_token_id": 59,
            "text_config": TEXT_8,
            "audio_config": {
                **WHISPER,
                "output_dim": 32,
                "n_window": 4 * LONGEST,
                "n_window_infer": 8 * LONGEST,
                "downsample_hidden_size": 4,
            },
        },
        FRAMES_8,
    ),
    "fun_asr_nano": Recipe(
        "FunAsrNanoForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "text_config": TEXT_8,
            "audio_config": {
                **SIZES,
                "num_mel_bins": 4,
                "num_stacked_frames": 2,
                "num_hidden_layers": 2,
                "num_timestamp_prediction_layers": 1,
                "fsmn_kernel_size": 3,
            },
            "adaptor_config": {
                "hidden_size": 32,
                "intermediate_size": 8,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "projector_hidden_size": 16,
            },
        },
        partial(frames, per_token=1, time_first=True),
    ),
    "vibevoice_asr": Recipe(
        "VibeVoiceAsrForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "audio_bos_token_id": BEGIN,
            "audio_eos_token_id": END,
            "text_config": TEXT,
            "acoustic_tokenizer_encoder_config": VIBEVOICE_ENCODER,
            "semantic_tokenizer_encoder_config": VIBEVOICE_ENCODER,
            "acoustic_tokenizer_chunk_size": 400,
        },
        vibevoice_audio,
    ),
    "moss_transcribe_diarize": Recipe(
        "MossTranscribeDiarizeForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "text_config": TEXT_8,
            "audio_config": {**WHISPER, "max_source_positions": 4 * LONGEST},
        },
        moss_audio,
    ),
    "dots3_note": Recipe(
        "Dots3NoteForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "text_config": {
                **TEXT_8,
                **MOE,
                "n_routed_experts": 4,
                "shared_experts_intermediate_size": 16,
                "num_key_value_heads": 4,
                "kv_lora_rank": 8,
                "q_lora_rank": 8,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4,
                "v_head_dim": 8,
                "index_head_dim": 8,
                "index_n_heads": 2,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 4,
                "swa_kv_lora_rank": 8,
                "swa_q_lora_rank": 8,
                "swa_head_dim": 8,
                "swa_qk_nope_head_dim": 4,
                "swa_v_head_dim": 8,
            },
            "audio_config": {
                **SIZES,
                "num_hidden_layers": 1,
                "feature_size": 8,
                "downsample_hidden_size": 4,
                "adapter_input_size": 16,
                "adapter_out_dim": 32,
            },
            "vision_config": {
                **SIZES,
                "num_hidden_layers": 1,
                "mlp_layer_types": ["dense"],
                "adapter_in_dim": 16,
                "adapter_out_dim": 32,
            },
        },
        dots_audio,
    ),
    "inkling_mm_model": Recipe(
        "InklingForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "text_config": {
                **TEXT_8,
                **MOE,
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
                "swa_head_dim": 8,
                "d_rel": 4,
                "rel_extent": 16,
            },
            "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8},
            "vision_config": {
                "patch_size": 4,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        },
        inkling_audio,
    ),
    "muse_spark": Recipe(
        "MuseSparkForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "out_hidden_size": 16,
            "projector_hidden_size": 16,
            "text_config": {**TEXT_8, **MOE, "num_local_experts": 4, "moe_hidden_size": 16},
            "audio_config": {
                "patch_sizes": [2, 2],
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "out_hidden_size": 32,
            },
            "vision_config": {**SIZES, "num_hidden_layers": 1},
        },
        muse_audio,
    ),
    "gemma3n": Recipe(
        "Gemma3nForConditionalGeneration",
        {
            **GEMMA,
            "eoa_token_id": END,
            "audio_soft_tokens_per_image": 5,
            "text_config": {**GEMMA_TEXT, **GEMMA_PER_LAYER, "laurel_rank": 4},
            # the ids from AUDIO on have embeddings of their own
            "audio_config": {
                "vocab_size": VOCABULARY - AUDIO,
                "vocab_offset": AUDIO,
                "hidden_size": 16,
                "input_feat_size": 8,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
                "conf_reduction_factor": 1,
                "sscp_conv_channel_size": [4, 4],
            },
            "vision_config": {"vocab_size": 4, "vocab_offset": AUDIO - 4, "hidden_size": 16},
        },
        partial(frames, time_first=True, mask_dtype=torch.bool),
        tokens=5,
    ),
    "gemma4": Recipe(
        "Gemma4ForConditionalGeneration",
        {
            **GEMMA_4,
            "text_config": {**GEMMA_TEXT, **GEMMA_PER_LAYER, "global_head_dim": 8},
            "audio_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "subsampling_conv_channels": [128, 4],
                "output_proj_dims": 16,
            },
            "vision_config": {
                **SIZES,
                "num_hidden_layers": 1,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "position_embedding_size": 16,
            },
        },
        partial(frames, bins=128, time_first=True, mask_dtype=torch.bool),
    ),
    "gemma4_unified": Recipe(
        "Gemma4UnifiedForConditionalGeneration",
        {
            **GEMMA_4,
            "text_config": {**GEMMA_TEXT, "global_head_dim": 8},
            "audio_config": {"audio_embed_dim": 8},
            "vision_config": {
                "patch_size": 4,
                "mm_embed_dim": 16,
                "mm_posemb_size": 16,
                "output_proj_dims": 16,
            },
        },
        partial(frames, per_token=1, time_first=True, mask_dtype=torch.bool),
    ),
    "phi4_multimodal": Recipe(
        "Phi4MultimodalForCausalLM",
        {
            **TEXT,
            "eos_token_id": [VOCABULARY - 1],
            "audio_config": {
                **SIZES,
                "num_blocks": 2,
                "ext_pw_out_channel": 16,
                "depthwise_separable_out_channel": 16,
                "input_size": 8,
                "nemo_conv_channels": 16,
                "audio_token_id": AUDIO,
            },
            "vision_config": {
                **SIZES,
                "num_hidden_layers": 2,
                "image_size": 28,
                "crop_size": 28,
                "image_token_id": IMAGE,
            },
        },
        phi_audio,
        text=(),
    ),
    "nemo_speechlm": Recipe(
        "Nemotron3_5TranscribeForConditionalGeneration",
        {
            "audio_token_id": VOCABULARY,  # has no embedding
            "text_config": NEMOTRON_H,
            "audio_config": {
                "asr_config": {**SIZES, "num_hidden_layers": 1, "num_mel_bins": 8},
                "diarization_config": {
                    "audio_config": {**SIZES, "num_hidden_layers": 1, "num_mel_bins": 8},
                    "head_config": {"hidden_size": 8, "audio_hidden_size": 16},
                },
            },
            "word_timestamp_config": {
                **SIZES,
                "num_hidden_layers": 1,
                "vocab_size": 8,
                "blank_token_id": 7,
            },
        },
        partial(frames, per_token=8, time_first=True),
    ),
    "nemotron_h_omni": Recipe(
        "NemotronH_Omni_Reasoning_V3",
        {
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "text_config": NEMOTRON_H,
            "projector_hidden_size": 16,
            "vision_hidden_size": 16,
            "vision_config": {
                "model_type": "radio",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "mlp_ratio": 1.0,
                "patch_size": 4,
                "image_size": 8,
                "max_img_size": 16,
                "video_temporal_patch_size": 2,
            },
            "audio_config": {
                **SIZES,
                "num_hidden_layers": 1,
                "subsampling_conv_channels": 4,
                "num_mel_bins": 8,
                "projection_hidden_size": 16,
                "projection_bias": False,
            },
        },
        partial(frames, per_token=8, less=1, time_first=True),
    ),
}

SPEECH_TO_TEXT = {**TEXT, "eos_token_id": VOCABULARY - 1, "decoder_start_token_id": 1}
# text attends to their encoder
ENCODERS = {
    "whisper": Recipe(
        "WhisperForConditionalGeneration",
        {
            **SPEECH_TO_TEXT,
            **WHISPER_40,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
            "max_target_positions": 32,
            "begin_suppress_tokens": None,
        },
        partial(frames, per_token=2, width=4 * LONGEST, mask=None),
        text=(),
        tokens=2 * LONGEST,
    ),
    "moonshine": Recipe(
        "MoonshineForConditionalGeneration",
        {
            **SPEECH_TO_TEXT,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 2,
            "decoder_num_attention_heads": 2,
        },
        moonshine_audio,
        text=(),
    ),
}

# every position is audio
STREAMING = {
    "voxtral_realtime": Recipe(
        "VoxtralRealtimeForConditionalGeneration",
        {
            "text_config": {**TEXT_8, "sliding_window": 64},
            "audio_config": {**SIZES, "num_hidden_layers": 1, "num_mel_bins": 8, "head_dim": 8},
        },
        realtime_audio,
    ),
    "kyutai_speech_to_text": Recipe(
        "KyutaiSpeechToTextForConditionalGeneration",
        {
            **TEXT_8,
            "ffn_dim": 32,
            "num_codebooks": 4,
            "codebook_vocab_size": 17,
            "audio_bos_token_id": 16,
            "audio_pad_token_id": VOCABULARY + 4 * 17,
            "num_key_value_heads": 4,
            "codec_config": {
                **SIZES,
                "model_type": "mimi",
                "num_hidden_layers": 1,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_filters": 4,
                "upsampling_ratios": [4, 4],
                "upsample_groups": 16,
                "codebook_size": 16,
                "codebook_dim": 8,
                "vector_quantization_hidden_dimension": 8,
                "num_quantizers": 4,
            },
        },
        kyutai_audio,
        text=(),
    ),
}


# --- hosts and prompts ----------------------------------------------------------------------------


def tiny_host(name: str = "qwen2_audio", *, seed: int = 0, **overrides: Any) -> Any:
    """A real transformers host with a tiny random configuration, in eval mode.

    Args:
        name: ``config.model_type``, a key of ``RECIPES``, ``ENCODERS`` or ``STREAMING``.
        seed: of its weights.
        overrides: fields of the text configuration, such as ``num_hidden_layers``.

    Raises:
        ArgumentError: there is no tiny host of that name.

    Example:
        >>> from mal_kernels.testing import tiny_host
        >>> type(tiny_host("voxtral")).__name__
        'VoxtralForConditionalGeneration'
    """
    import transformers

    recipes = {**RECIPES, **ENCODERS, **STREAMING}
    if name not in recipes:
        raise ArgumentError(f"name is {name!r}; tiny hosts exist for {sorted(recipes)}.")
    recipe = recipes[name]
    config = _with(recipe.config, recipe.text, overrides)
    host_class = getattr(transformers, recipe.model)
    whole = transformers.AutoModel.from_config

    def part(config: Any, **kwargs: Any) -> Any:
        # this vision tower needs timm, and a prompt without images does not need it
        unseen = config.model_type == "gemma3n_vision"
        return nn.Identity() if unseen else whole(config, **kwargs)

    with (
        torch.random.fork_rng(devices=[]),
        patch.object(transformers.AutoModel, "from_config", part),
    ):
        torch.manual_seed(seed)
        host = host_class(host_class.config_class(**config))
    answers: Any = Host.of(host).model
    answers.generation_config.update(pad_token_id=0, eos_token_id=None, max_new_tokens=4)
    return host.eval()


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
        for a streaming host what its ``generate`` takes.
    """
    name = host.config.model_type
    generator = torch.Generator().manual_seed(seed)
    if name not in RECIPES:
        recipe = {**ENCODERS, **STREAMING}[name]
        lengths = [recipe.tokens or row[0] for row in clips]
        inputs = recipe.audio(torch.tensor(lengths), generator)
        prompt = torch.randint(3, 50, (len(clips), 3), generator=generator)
        return {**inputs, "decoder_input_ids": prompt} if name in ENCODERS else inputs
    recipe = RECIPES[name]
    audio = Host.of(host).audio_token_id
    rows, lengths = [], []
    for row in clips:
        ids = [1, *torch.randint(3, 50, (2,), generator=generator).tolist()]
        for tokens in (recipe.tokens or tokens for tokens in row):
            ids += [BEGIN, *[audio] * tokens, END]
            lengths.append(tokens)
        rows.append(ids + torch.randint(3, 50, (3,), generator=generator).tolist())
    width = max(map(len, rows))
    pad = [[0] * (width - len(ids)) for ids in rows]
    both = list(zip(rows, pad, strict=True))
    padded = torch.tensor([p + ids if side == "left" else ids + p for ids, p in both])
    inputs = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    return {**inputs, **recipe.audio(torch.tensor(lengths), generator)} if lengths else inputs
