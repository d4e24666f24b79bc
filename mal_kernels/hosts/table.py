"""The types of host that are known: the table that a contributor edits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from .spec import (
    SPECS,
    HostSpec,
    cut_at_frames,
    cut_at_samples,
    final_layer,
    frame_mask,
    mask_of_samples,
    register_host,
    window_mask,
)


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
    HostSpec("granite_speech", time=1),
    HostSpec("granite_speech_plus", time=1),
    HostSpec("qwen2_5_omni", root="thinker"),
    HostSpec("qwen2_5_omni_thinker"),
    HostSpec("qwen3_omni_moe", root="thinker"),
    HostSpec("qwen3_omni_moe_thinker"),
    HostSpec("qwen3_asr"),
    HostSpec("fun_asr_nano", time=1),
    HostSpec("vibevoice_asr", audio_inputs=("input_values",)),
    HostSpec("moss_transcribe_diarize"),
    HostSpec("dots3_note", mask=mask_of_samples),
    HostSpec("inkling_mm_model", audio_inputs=("audio_input_ids",), time=1),
    HostSpec("muse_spark", audio_inputs=("input_values",)),
    HostSpec("gemma3n", stream="altup_active_idx", time=1),
    HostSpec("gemma4", time=1),
    HostSpec("gemma4_unified", time=1),
    HostSpec(
        "phi4_multimodal",
        audio_inputs=("audio_input_features",),
        audio_token="audio_config.audio_token_id",
        embeds_inside=True,
        time=1,
    ),
    HostSpec("nemo_speechlm", time=1),  # Nemotron 3.5 Transcribe
    HostSpec("nemotron_h_omni", time=1),
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
    _encoder("canary", time=1),
    _encoder("cohere_asr", time=1),
    _encoder("speech_to_text", encoder_mask=frame_mask, time=1),
    _encoder("seamless_m4t", encoder="speech_encoder", encoder_mask=frame_mask, time=1),
    _encoder("seamless_m4t_v2", encoder="speech_encoder", encoder_mask=frame_mask, time=1),
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
        time=1,
        width="audio_embed_dim",
        recognise=_has("audio_transformer"),
    ),
    _encoder(
        "audio_flamingo_2",
        audio_inputs=("audio_x",),
        encoder="audio_transformer_clap",
        encoder_mask=window_mask,
        time=1,
        width="clap_embed_dim",
        recognise=_has("audio_transformer_clap"),
    ),
):
    register_host(_spec)

BUILT_IN = frozenset(SPECS)  # the types that come with the package
