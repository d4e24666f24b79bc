"""Configurations of the tiny hosts: the real classes of transformers, only narrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import audio
from .audio import LONGEST, frames

VOCABULARY, IMAGE, VIDEO, AUDIO, BEGIN, END = 64, 56, 57, 60, 61, 62


@dataclass(frozen=True)
class Recipe:
    """How to make one host and its audio.

    Args:
        model: class in transformers.
        config: arguments of its configuration class.
        audio: makes the audio arguments of ``N`` clips, from their numbers of tokens ``[N]``.
        text: where the arguments of the text model belong in ``config``.
        tokens: how many tokens every clip has, if the host leaves no choice.
        rows: whether ``audio`` is given the tokens of the clips of each row ``[B, C]`` instead.
        beams: whether the host has beam search.
    """

    model: str
    config: Mapping[str, Any]
    audio: Callable[[Tensor, torch.Generator], dict[str, Any]]
    text: tuple[str, ...] = ("text_config",)
    tokens: int | None = None
    rows: bool = False
    beams: bool = True


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
    "vae_std": 0.0,  # what it hears would have noise
}
VIBEVOICE_CODEC = {**VIBEVOICE_ENCODER, "model_type": "vibevoice_acoustic_tokenizer"}
MIMI = {
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
        {
            "audio_token_index": AUDIO,
            "text_config": TEXT,
            "audio_config": WHISPER_40,
            # transformers 5.10 ties them, and a tied host of random weights repeats its last word
            "tie_word_embeddings": False,
        },
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
    "granite_speech": Recipe("GraniteSpeechForConditionalGeneration", GRANITE, audio.granite),
    "granite_speech_plus": Recipe(
        "GraniteSpeechPlusForConditionalGeneration",
        {
            **GRANITE,
            "encoder_config": {**GRANITE["encoder_config"], "cat_hidden_layers": [1]},
            "projector_config": {**GRANITE["projector_config"], "encoder_hidden_size": 32},
        },
        audio.granite,
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
        audio.vibevoice,
    ),
    "moss_transcribe_diarize": Recipe(
        "MossTranscribeDiarizeForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "text_config": TEXT_8,
            "audio_config": {**WHISPER, "max_source_positions": 4 * LONGEST},
        },
        audio.moss,
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
        audio.dots,
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
        audio.inkling,
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
        audio.muse,
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
        audio.phi,
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
    "vibevoice": Recipe(
        "VibeVoiceForConditionalGeneration",
        {
            "audio_token_id": AUDIO,
            "audio_bos_token_id": BEGIN,
            "audio_eos_token_id": END,
            "pad_token_id": 0,
            "eos_token_id": END,
            "text_config": {**TEXT, "model_type": "qwen2"},
            "audio_config": VIBEVOICE_CODEC,
            "semantic_model_config": {
                **VIBEVOICE_ENCODER,
                "model_type": "vibevoice_acoustic_tokenizer_encoder",
            },
            "diffusion_head_config": {
                "hidden_size": 32,
                "latent_size": VIBEVOICE_ENCODER["hidden_size"],
                "num_hidden_layers": 1,
                "intermediate_size": 16,
            },
        },
        audio.vibevoice,
        beams=False,
    ),
    "csm": Recipe(
        "CsmForConditionalGeneration",
        {
            **TEXT_8,
            "vocab_size": 17,
            "text_vocab_size": VOCABULARY,
            "num_codebooks": 4,
            "codebook_pad_token_id": 16,
            "codebook_eos_token_id": 0,
            "audio_token_id": AUDIO,
            "audio_eos_token_id": END,
            "depth_decoder_config": {
                **SIZES,
                "num_hidden_layers": 1,
                "num_key_value_heads": 2,
                "vocab_size": 17,
                "num_codebooks": 4,
                "backbone_hidden_size": 32,
            },
            "codec_config": MIMI,
        },
        audio.csm,
        text=(),
        rows=True,
        beams=False,
    ),
    "higgs_audio_v2": Recipe(
        "HiggsAudioV2ForConditionalGeneration",
        {
            **TEXT_8,
            "eos_token_id": VOCABULARY - 1,
            "num_codebooks": 2,
            "codebook_size": 16,
            "audio_token_id": AUDIO,
            "audio_bos_token_id": BEGIN,
            "audio_delay_token_id": 59,
            "audio_stream_bos_id": 14,
            "audio_stream_eos_id": 15,
        },
        audio.higgs,
        text=(),
        rows=True,
        beams=False,
    ),
}

SPEECH_TO_TEXT = {**TEXT, "eos_token_id": VOCABULARY - 1, "decoder_start_token_id": 1}
PARAKEET = {
    **SIZES,
    "num_hidden_layers": 1,
    "num_mel_bins": 8,
    "subsampling_conv_channels": 4,
}
SEAMLESS = {
    **SPEECH_TO_TEXT,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "feature_projection_input_dim": 8,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 16,
    "adaptor_kernel_size": 8,
    "adaptor_stride": 8,
    "num_adapter_layers": 1,
    "max_source_positions": 128,
}
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
        audio.moonshine,
        text=(),
    ),
    "moonshine_streaming": Recipe(
        "MoonshineStreamingForConditionalGeneration",
        {
            **SPEECH_TO_TEXT,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "encoder_config": {
                **SIZES,
                "num_hidden_layers": 1,
                "num_key_value_heads": 2,
                "sliding_windows": [[16, 4]],
            },
        },
        audio.moonshine_streaming,
        text=(),
    ),
    "canary": Recipe(
        "CanaryForConditionalGeneration",
        {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": VOCABULARY - 1,
            "decoder_start_token_id": 1,
            "vocab_size": VOCABULARY,
            "encoder_config": {**PARAKEET, "hidden_size": 32},
            "decoder_config": {**TEXT_8, "num_key_value_heads": 4},
        },
        partial(frames, per_token=8, time_first=True, mask="attention_mask"),
        text=("decoder_config",),
    ),
    "cohere_asr": Recipe(
        "CohereAsrForConditionalGeneration",
        {**SPEECH_TO_TEXT, "encoder_config": PARAKEET, "head_dim": 8},
        partial(frames, per_token=8, time_first=True, mask="attention_mask"),
        text=(),
    ),
    "speech_to_text": Recipe(
        "Speech2TextForConditionalGeneration",
        {
            **SPEECH_TO_TEXT,
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
            "conv_channels": 16,
            "input_feat_per_channel": 8,
        },
        partial(frames, per_token=4, time_first=True, mask="attention_mask"),
        text=(),
    ),
    **{
        f"seamless_m4t{version}": Recipe(
            f"SeamlessM4T{version.removeprefix('_')}ForSpeechToText",
            SEAMLESS,
            partial(frames, per_token=8, less=8, time_first=True, mask="attention_mask"),
            text=(),
        )
        for version in ("", "_v2")
    },
}

# every position is audio
STREAMING = {
    "voxtral_realtime": Recipe(
        "VoxtralRealtimeForConditionalGeneration",
        {
            "text_config": {**TEXT_8, "sliding_window": 64},
            "audio_config": {**SIZES, "num_hidden_layers": 1, "num_mel_bins": 8, "head_dim": 8},
        },
        audio.realtime,
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
            "codec_config": MIMI,
        },
        audio.kyutai,
        text=(),
    ),
    "moshi": Recipe(
        "MoshiForConditionalGeneration",
        {
            **TEXT_8,
            "ffn_dim": 32,
            "num_key_value_heads": 4,
            "num_codebooks": 4,
            "audio_vocab_size": 16,
            "audio_encoder_config": {**MIMI, "frame_rate": 750.0, "sampling_rate": 24000},
            "depth_decoder_config": {
                **SIZES,
                "vocab_size": VOCABULARY,
                "ffn_dim": 32,
                "num_hidden_layers": 1,
                "num_codebooks": 4,
                "audio_vocab_size": 16,
                "input_size": 32,
                "max_position_embeddings": 5,
            },
        },
        audio.moshi,
        text=(),
    ),
}
