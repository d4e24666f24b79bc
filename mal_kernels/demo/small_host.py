"""A real Qwen2-Audio, only small: the classes and the processor of the 8 B model, 64 wide.

It is pre-trained on the spot on what one utterance can tell (its pitch, the voice's timbre, and the
emotion as far as that goes), then frozen: it plays the part of an audio language model that hears
well and remembers nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mal_kernels.demo import synth

if TYPE_CHECKING:
    from transformers import (
        BatchFeature,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

# one token answers; pitch and timbre are only asked in pre-training
ANSWERS = {
    "emotion": synth.LABELS,
    "pitch": tuple(f"pitch{i}" for i in range(32)),  # bins of a semitone
    "timbre": tuple(f"timbre{i}" for i in range(16)),  # bins of the vocal tract's log scale
}
TIMBRE_BIN = 0.05
MARKERS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
WORDS = ("<pad>", "<eos>", *MARKERS, *ANSWERS, *itertools.chain(*ANSWERS.values()))
PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|> {task}"
MELS, HOP, FFT = 128, 320, 1024  # 64 ms windows: the harmonics of a low voice stay apart
FRAMES = synth.CLIP_SAMPLES // HOP  # 32 mel frames, hence 8 audio tokens a clip
AUDIO = slice(1, 1 + FRAMES // 4)  # where token_ids() has the audio tokens
WIDTH, HEADS = 64, 4


def answer_ids(task: str = "emotion") -> list[int]:
    """Token ids of the answers to a task, in the order of its classes."""
    return [WORDS.index(word) for word in ANSWERS[task]]


def build_feature_extractor() -> WhisperFeatureExtractor:
    """Whisper's log-mel front end, for clips of ``synth.CLIP_SAMPLES``."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(
        MELS, sampling_rate=synth.SAMPLE_RATE, hop_length=HOP, n_fft=FFT, chunk_length=1
    )
    extractor.n_samples, extractor.nb_max_frames = synth.CLIP_SAMPLES, FRAMES  # not whole seconds
    return extractor


def build_processor() -> Qwen2AudioProcessor:
    """The stock processor: expands ``<|AUDIO|>`` to one placeholder per audio token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=WORDS[0],
        eos_token=WORDS[1],
        additional_special_tokens=list(MARKERS),
        padding_side="left",
    )
    return Qwen2AudioProcessor(build_feature_extractor(), tokenizer)


def build_host(seed: int = 0) -> Qwen2AudioForConditionalGeneration:
    """A freshly initialised host in eval mode."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2Config,
    )

    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=MELS,
        d_model=WIDTH,
        encoder_layers=1,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * WIDTH,
        max_source_positions=FRAMES // 2,
    )
    text = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    config = Qwen2AudioConfig(
        audio_config=audio,
        text_config=text,
        audio_token_index=WORDS.index("<|AUDIO|>"),
        tie_word_embeddings=False,  # the default of transformers 5.10 is True
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        host = Qwen2AudioForConditionalGeneration(config)
    host.generation_config.pad_token_id, host.generation_config.eos_token_id = 0, 1
    return host.eval()


def prompt(
    processor: Qwen2AudioProcessor, waves: Sequence[np.ndarray], task: str = "emotion"
) -> BatchFeature:
    """Model inputs that ask ``task`` of each 0.64 s clip, one clip a row."""
    return processor(
        text=[PROMPT.format(task=task)] * len(waves),
        audio=list(waves),
        sampling_rate=synth.SAMPLE_RATE,
        return_tensors="pt",
    )


def token_ids(rows: int, task: str = "emotion") -> Tensor:
    """Returns what :func:`prompt` makes of its text, int64 ``[rows, 3 + audio tokens]``."""
    bos, audio, eos = (WORDS.index(marker) for marker in MARKERS)
    ids = [bos, *[audio] * (FRAMES // 4), eos, WORDS.index(task)]
    return torch.tensor(ids).expand(rows, -1)


def pretraining_targets(script: synth.Script) -> dict[str, Tensor]:
    """The right answer of each task for every turn, as int64 token ids ``[N * T]``."""
    pitch, timbre = voices(script)
    classes = {
        "emotion": script.label,
        "pitch": _bins(pitch, "pitch"),
        "timbre": _bins(timbre / TIMBRE_BIN, "timbre"),
    }
    return {
        task: torch.tensor(answer_ids(task))[torch.from_numpy(values).long().flatten()]
        for task, values in classes.items()
    }


def voices(script: synth.Script) -> np.ndarray:
    """Pitch in semitones and log vocal-tract scale of every turn, ``[2, N, T]``."""
    return np.stack([script.pitch, np.take_along_axis(script.timbre, script.speaker, axis=1)])


def _bins(values: np.ndarray, task: str) -> np.ndarray:
    """The nearest bin of each value; zero is in the middle one, the ends take what is beyond."""
    count = len(ANSWERS[task])
    return np.clip(np.rint(values) + count // 2, 0, count - 1)


def pretrain(
    script: synth.Script,
    features: Tensor,
    *,
    steps: int = 1000,
    batch: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> Qwen2AudioForConditionalGeneration:
    """Train a new host to answer every task about single utterances, then freeze it.

    A linear probe on its mean audio token, thrown away afterwards, learns pitch and timbre beside
    the answers: without it one task is learned long before the other is.

    Args:
        script: of ``N`` dialogues with ``T`` turns.
        features: their log-mel features ``[N, T, MELS, FRAMES]``.
        steps: of the optimizer.
        batch: utterances in a step.
        lr: highest learning rate.
        seed: of the initial weights and of the order of the data.
        on_step: called after every step.
    """
    host = build_host(seed)
    features = features.flatten(0, 1)
    targets = pretraining_targets(script)
    answers = torch.stack([targets[task] for task in ANSWERS])  # [tasks, N * T]
    prompts = torch.cat([token_ids(1, task) for task in ANSWERS])  # [tasks, S]
    voice = torch.from_numpy(voices(script)).float().flatten(1).T  # [N * T, 2]
    voice = (voice - voice.mean(0)) / voice.std(0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        probe = nn.Linear(WIDTH, 2)
    parameters = [*host.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = cosine(optimizer, steps, warmup=50)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(features), (batch,), generator=draw)
        task = torch.randint(len(ANSWERS), (batch,), generator=draw)
        audio = audio_tokens(host, features[rows])
        logits = answer_logits(host, input_embeds(host, audio, prompts[task]))
        loss = F.cross_entropy(logits, answers[task, rows])
        loss = loss + F.mse_loss(probe(audio.mean(1)), voice[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        on_step()
    return host.requires_grad_(False)


def audio_tokens(host: Qwen2AudioForConditionalGeneration, features: Tensor) -> Tensor:
    """Encodes clips ``[rows, MELS, FRAMES]`` to ``[rows, audio tokens, WIDTH]``."""
    heard = host.model.audio_tower(features.float()).last_hidden_state
    return host.model.multi_modal_projector(heard)


def input_embeds(
    host: Qwen2AudioForConditionalGeneration, audio: Tensor, input_ids: Tensor
) -> Tensor:
    """Embeddings of prompts ``[rows, S]`` with their :func:`audio_tokens`: ``[rows, S, WIDTH]``."""
    text = host.get_input_embeddings()(input_ids)
    return torch.cat([text[:, : AUDIO.start], audio, text[:, AUDIO.stop :]], 1)


def answer_logits(host: Qwen2AudioForConditionalGeneration, embeds: Tensor) -> Tensor:
    """Logits of the answer ``[rows, len(WORDS)]`` for input embeddings ``[rows, S, WIDTH]``."""
    hidden = host.model.language_model(inputs_embeds=embeds, use_cache=False)
    return host.lm_head(hidden.last_hidden_state[:, -1])


def cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then half a cosine down to one percent."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
