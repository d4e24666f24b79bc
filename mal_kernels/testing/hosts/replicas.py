"""Hosts that transformers does not have, in miniature and written anew.

Each puts its audio among the text as the model does that it is named after, and is called like it;
what goes on inside is the shortest that serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .recipes import BEGIN, END, TEXT

BINS, WIDTH = 8, 16  # of a frame, and of an audio encoder


def text_model(**overrides: Any) -> Any:
    """A tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **overrides}))


def encoder() -> nn.Module:
    """One audio token ``[N, T, WIDTH]`` for each frame ``[N, T, BINS]``."""
    return nn.Sequential(nn.Linear(BINS, WIDTH), nn.GELU())


def words(*shape: int, generator: torch.Generator) -> Tensor:
    """Text tokens."""
    return torch.randint(3, 50, shape, generator=generator)


def spectrograms(tokens: Sequence[int], generator: torch.Generator) -> Tensor:
    """Clips ``[N, T, BINS]``, padded with zeros."""
    return pad_sequence([torch.randn(n, BINS, generator=generator) for n in tokens], True)


class Ultravox(nn.Module):
    """Audio overwrites a stretch of the embeddings that arguments point to.

    Parts are called by their ``forward``, which hooks do not see, and ``generate`` does not call
    the ``forward`` of the whole.
    """

    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="ultravox")
        self.language_model = text_model(**overrides)
        self.audio_tower = encoder()
        self.multi_modal_projector = nn.Linear(WIDTH, self.language_model.config.hidden_size)

    def _prepare_audio_embeds(
        self,
        inputs_embeds: Tensor,
        audio_values: Tensor,
        audio_token_start_idx: Tensor,
        audio_token_len: Tensor,
        audio_batch_size: Tensor,
    ) -> Tensor:
        heard = self.multi_modal_projector.forward(self.audio_tower.forward(audio_values))
        rows = torch.arange(len(inputs_embeds)).repeat_interleave(audio_batch_size)
        for i, row in enumerate(rows):
            start, length = int(audio_token_start_idx[i]), int(audio_token_len[i])
            inputs_embeds[row, start : start + length] = heard[i, :length]
        return inputs_embeds

    def _embed(self, input_ids: Tensor, audio: dict[str, Tensor]) -> Tensor:
        embeds: Tensor = self.language_model.get_input_embeddings().forward(input_ids)
        return self._prepare_audio_embeds(embeds, **audio) if audio else embeds

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **audio: Tensor
    ) -> Any:
        """Logits of the prompt."""
        embeds = self._embed(input_ids, audio)
        return self.language_model.forward(inputs_embeds=embeds, attention_mask=attention_mask)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        """Hands the embeddings over to the text model."""
        audio = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("audio_")}
        embeds = self._embed(input_ids, audio)
        return self.language_model.generate(
            inputs_embeds=embeds, attention_mask=attention_mask, **kwargs
        )

    def prompt(self, clips: Sequence[Sequence[int]], generator: torch.Generator) -> dict[str, Any]:
        """Rows of text around clips, padded on the right."""
        rows, starts = [], []
        for row in clips:
            ids = words(3, generator=generator).tolist()
            for tokens in row:
                starts.append(len(ids))
                ids += [7] * tokens + words(2, generator=generator).tolist()
            rows.append(torch.tensor(ids))
        input_ids = pad_sequence(rows, True)
        lengths = [tokens for row in clips for tokens in row]
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != 0).long(),
            "audio_values": spectrograms(lengths, generator),
            "audio_token_start_idx": torch.tensor(starts),
            "audio_token_len": torch.tensor(lengths),
            "audio_batch_size": torch.tensor([len(row) for row in clips]),
        }


class Salmonn(nn.Module):
    """Embeddings are joined: first token, text, audio of fixed length, text. There are no ids.

    Everything comes in one dictionary.
    """

    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        self.llama_model = text_model(**overrides)
        self.speech_encoder = encoder()
        self.speech_llama_proj = nn.Linear(WIDTH, self.llama_model.config.hidden_size)

    def _wrap(self, samples: dict[str, Tensor]) -> Tensor:
        embed = self.llama_model.get_input_embeddings()
        speech = self.speech_llama_proj(self.speech_encoder(samples["spectrogram"]))
        rows = len(speech)
        before, after = (embed(samples[name]).expand(rows, -1, -1) for name in ("before", "after"))
        first = embed(torch.ones(rows, 1, dtype=torch.long))
        return torch.cat([first, before, speech, after], 1)

    def forward(self, samples: dict[str, Tensor]) -> Any:
        """Logits of the prompt with its answer."""
        answer = self.llama_model.get_input_embeddings()(samples["text"])
        return self.llama_model(inputs_embeds=torch.cat([self._wrap(samples), answer], 1))

    def generate(self, samples: dict[str, Tensor], **options: Any) -> Any:
        """Hands the embeddings over to the text model."""
        return self.llama_model.generate(inputs_embeds=self._wrap(samples), **options)

    def prompt(self, clips: Sequence[Sequence[int]], generator: torch.Generator) -> dict[str, Any]:
        """One clip a row, all of the length of the first."""
        spectrogram = spectrograms([clips[0][0]] * len(clips), generator)
        before, after = (words(1, n, generator=generator) for n in (3, 2))
        text = words(len(clips), 2, generator=generator)
        samples = {"spectrogram": spectrogram, "before": before, "after": after, "text": text}
        return {"samples": samples}


class Salmonn2(nn.Module):
    """The prompt grows: behind each start token stands a clip of any length, with times in words.

    Args:
        stamp_every: audio tokens between two such times; ``None`` for none.
        overrides: fields of the text configuration.
    """

    def __init__(self, stamp_every: int | None = 4, **overrides: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="salmonn_2")
        self.base_llm = text_model(**overrides)
        self.audio_encoder = encoder()
        self.connector = nn.Linear(WIDTH, self.base_llm.config.hidden_size)
        self.stamp_every = stamp_every

    def _expand(
        self, input_ids: Tensor, attention_mask: Tensor, audio_features: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        embed = self.base_llm.get_input_embeddings()
        heard = self.connector(self.audio_encoder(audio_features))
        clips = iter(zip(heard, lengths.tolist(), strict=True))
        rows = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            pieces = []
            for token in ids[mask]:
                pieces.append(embed(token[None]))
                if token == BEGIN:
                    clip, length = next(clips)
                    for i, part in enumerate(clip[:length].split(self.stamp_every or length)):
                        pieces += [part, embed(torch.tensor([10 + i]))][
                            : 2 if self.stamp_every else 1
                        ]
            rows.append(torch.cat(pieces))
        masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
        return pad_sequence(rows, True), pad_sequence(masks, True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        audio_features: Tensor,
        audio_lengths: Tensor,
    ) -> Any:
        """Logits of the longer prompt."""
        embeds, mask = self._expand(input_ids, attention_mask, audio_features, audio_lengths)
        return self.base_llm(inputs_embeds=embeds, attention_mask=mask)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        audio_features: Tensor,
        audio_lengths: Tensor,
        **options: Any,
    ) -> Any:
        """Hands the embeddings over to the text model."""
        embeds, mask = self._expand(input_ids, attention_mask, audio_features, audio_lengths)
        return self.base_llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)

    def prompt(self, clips: Sequence[Sequence[int]], generator: torch.Generator) -> dict[str, Any]:
        """Rows with a start token for each clip, padded on the right."""
        rows = []
        for row in clips:
            parts = [words(2, generator=generator)]
            for _ in row:
                parts += [torch.tensor([BEGIN]), words(2, generator=generator)]
            rows.append(torch.cat(parts))
        input_ids = pad_sequence(rows, True)
        lengths = [tokens for row in clips for tokens in row]
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != 0).long(),
            "audio_features": spectrograms(lengths, generator),
            "audio_lengths": torch.tensor(lengths),
        }


def run_layers(model: Any, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """``hidden`` ``[B, S, Dm]`` after the layers of a Llama; each is given the stream alone."""
    steps = torch.arange(hidden.shape[1])
    rotary = model.rotary_emb(hidden, steps[None])
    seen = (steps[:, None] >= steps) & attention_mask[:, None, None].bool()  # [B, 1, S, S]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)
    for layer in getattr(model, "layers", None) or model.h:
        output = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        hidden = output[0] if isinstance(output, tuple) else output
    return model.norm(hidden)


def greedy(model: nn.Module, input_ids: Tensor, max_new_tokens: int, **inputs: Any) -> Tensor:
    """Greedy search without a cache, in which the audio is given again at every step."""
    mask = inputs.pop("attention_mask")
    for _ in range(max_new_tokens):
        logits = model(input_ids=input_ids, attention_mask=mask, **inputs).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return input_ids


class LtuModel(nn.Module):
    """The inner model of :class:`Ltu`, which puts audio before the text and cuts it off again."""

    def __init__(self, config: Any, llama: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens, self.layers, self.norm = llama.embed_tokens, llama.layers, llama.norm
        self.rotary_emb = llama.rotary_emb
        self.audio_encoder = encoder()
        self.audio_proj = nn.Sequential(
            nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, config.hidden_size)
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, audio_input: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the text ``[B, S, Dm]``."""
        hidden = self.embed_tokens(input_ids)
        if audio_input is None:
            return run_layers(self, hidden, attention_mask)
        audio = self.audio_proj(self.audio_encoder(audio_input))
        mask = torch.cat([torch.ones(audio.shape[:2], dtype=torch.long), attention_mask], 1)
        return run_layers(self, torch.cat([audio, hidden], 1), mask)[:, audio.shape[1] :]


class Ltu(nn.Module):
    """LTU and LTU-AS: audio of fixed length before the text, joined inside the decoder.

    To all appearances it is a Llama. ``generate`` gives it the audio again at every step.
    """

    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        llama = text_model(**overrides)
        self.config, self.lm_head = llama.config, llama.lm_head
        self.model = LtuModel(self.config, llama.model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, audio_input: Tensor | None = None
    ) -> Any:
        """Logits of the text."""
        hidden = self.model(input_ids, attention_mask, audio_input)
        return SimpleNamespace(logits=self.lm_head(hidden))

    def generate(self, input_ids: Tensor, max_new_tokens: int = 4, **inputs: Any) -> Tensor:
        """Greedy search."""
        return greedy(self, input_ids, max_new_tokens, **inputs)

    def prompt(self, clips: Sequence[Sequence[int]], generator: torch.Generator) -> dict[str, Any]:
        """One clip a row, all of the length of the first."""
        input_ids = words(len(clips), 4, generator=generator)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "audio_input": spectrograms([clips[0][0]] * len(clips), generator),
        }


class QwenAudioEncoder(nn.Module):
    """An encoder that is reached by a method of its own and frames a clip by learned tokens."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.body, self.proj = encoder(), nn.Linear(WIDTH, hidden_size)
        self.audio_bos_eos_token = nn.Embedding(2, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Audio tokens ``[N, T, Dm]``."""
        return self.proj(self.body(features))

    def encode(self, features: Tensor, lengths: Tensor) -> list[Tensor]:
        """Returns the embeddings of each clip ``[1 + T + 1, Dm]``."""
        first, last = self.audio_bos_eos_token.weight.split(1)
        heard = zip(self(features), lengths.tolist(), strict=True)
        return [torch.cat([first, clip[:length], last]) for clip, length in heard]


class QwenAudioBlock(nn.Module):
    """A decoder layer that returns a tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        """The layer's output and nothing else."""
        return (self.layer(hidden_states, **kwargs),)


class QwenAudioModel(nn.Module):
    """The inner model of :class:`QwenAudio`."""

    def __init__(self, config: Any, llama: Any) -> None:
        super().__init__()
        self.config, self.wte, self.norm = config, llama.embed_tokens, llama.norm
        self.h = nn.ModuleList(QwenAudioBlock(layer) for layer in llama.layers)
        self.rotary_emb = llama.rotary_emb
        self.audio = QwenAudioEncoder(config.hidden_size)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, audio_info: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Hidden states ``[B, S, Dm]``."""
        hidden = self.wte(input_ids)
        if audio_info is not None:
            clips = self.audio.encode(audio_info["input_audios"], audio_info["audio_lengths"])
            starts, stops = ((input_ids == marker).nonzero() for marker in (BEGIN, END))
            for (row, a), (_, b), clip in zip(starts, stops, clips, strict=True):
                hidden[row, a : b + 1] = clip
        return run_layers(self, hidden, attention_mask)


class QwenAudio(nn.Module):
    """Qwen-Audio, the first: audio and a learned token on either side overwrite hidden states.

    That happens inside the decoder, whose list of layers has another name.
    """

    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        llama = text_model(**overrides)
        self.config = SimpleNamespace(model_type="qwen")
        self.transformer = QwenAudioModel(llama.config, llama.model)
        self.lm_head = llama.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, audio_info: dict[str, Tensor] | None = None
    ) -> Any:
        """Logits of the prompt."""
        hidden = self.transformer(input_ids, attention_mask, audio_info)
        return SimpleNamespace(logits=self.lm_head(hidden))

    def generate(self, input_ids: Tensor, max_new_tokens: int = 4, **inputs: Any) -> Tensor:
        """Greedy search."""
        return greedy(self, input_ids, max_new_tokens, **inputs)

    def prompt(self, clips: Sequence[Sequence[int]], generator: torch.Generator) -> dict[str, Any]:
        """Rows of text around clips between markers, padded on the left."""
        rows = []
        for row in clips:
            ids = words(2, generator=generator).tolist()
            for tokens in row:
                ids += [BEGIN, *[7] * tokens, END, *words(2, generator=generator).tolist()]
            rows.append(torch.tensor(ids))
        input_ids = pad_sequence(rows, True, padding_side="left")
        lengths = [tokens for row in clips for tokens in row]
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != 0).long(),
            "audio_info": {
                "input_audios": spectrograms(lengths, generator),
                "audio_lengths": torch.tensor(lengths),
            },
        }


class FlamingoLayer(nn.Module):
    """A decoder layer behind cross-attention to audio that was put down there beforehand."""

    def __init__(self, layer: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention = nn.MultiheadAttention(
            hidden_size, 2, kdim=WIDTH, vdim=WIDTH, batch_first=True
        )
        self.gate = nn.Parameter(torch.ones(1))
        self.condition(None, None)

    def condition(self, audio: Tensor | None, mask: Tensor | None) -> None:
        """Puts down audio ``[B, L, 1, WIDTH]`` and which of it is heard ``[B, L]``."""
        self.audio, self.mask = audio, mask

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        assert self.audio is not None
        assert self.mask is not None
        audio = self.audio.flatten(1, 2)
        seen, _ = self.attention(hidden_states, audio, audio, ~self.mask.bool(), False)
        return self.layer(hidden_states + self.gate.tanh() * seen, *args, **kwargs)


class AudioFlamingo(nn.Module):
    """Text attends to windows of audio across gates; no audio is in its stream.

    ``generate`` encodes once, before the text model runs. There is no ``config``.

    Args:
        overrides: fields of the text configuration.
    """

    per_window = 1  # positions of a window

    def __init__(self, **overrides: Any) -> None:
        super().__init__()
        self.lang_encoder = text_model(**overrides)
        layers, width = self.lang_encoder.model.layers, self.lang_encoder.config.hidden_size
        for i, layer in enumerate(layers):
            layers[i] = FlamingoLayer(layer, width)
        self.clap = nn.Linear(BINS, self.per_window * WIDTH)
        self._add_audio_transformer(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True))

    def _add_audio_transformer(self, module: nn.Module) -> None:
        self.audio_transformer, self.audio_embed_dim = module, WIDTH

    def _transform(self, audio: Tensor) -> Tensor:
        return self.audio_transformer(audio)

    def _encode_audio_x(self, audio_x: Tensor, mask: Tensor) -> None:
        audio = self.clap(audio_x).unflatten(-1, (self.per_window, WIDTH)).flatten(1, 2)
        mask = mask.repeat_interleave(self.per_window, 1).expand(len(audio), -1)
        heard = self._transform(audio).unsqueeze(2)
        for layer in self.lang_encoder.model.layers:
            layer.condition(heard, mask)

    def forward(
        self,
        audio_x: Tensor,
        audio_x_mask: Tensor,
        lang_x: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """Logits of the text."""
        self._encode_audio_x(audio_x, audio_x_mask)
        return self.lang_encoder(input_ids=lang_x, attention_mask=attention_mask)

    def generate(
        self, audio_x: Tensor, audio_x_mask: Tensor, lang_x: Tensor, **options: Any
    ) -> Any:
        """Encodes the audio of each beam, then runs the text model."""
        beams = options.get("num_beams", 1)
        self._encode_audio_x(audio_x.repeat_interleave(beams, 0), audio_x_mask)
        return self.lang_encoder.generate(input_ids=lang_x, **options)

    def prompt(self, clips: Sequence[Sequence[int]], generator: torch.Generator) -> dict[str, Any]:
        """One clip a row, of as many windows as its number of tokens."""
        windows = torch.tensor([row[0] for row in clips])
        text = words(len(clips), 4, generator=generator)
        return {
            "audio_x": spectrograms(windows.tolist(), generator),
            "audio_x_mask": windows[:, None] > torch.arange(int(windows.max())),
            "lang_x": text,
            "attention_mask": torch.ones_like(text),
        }


class AudioFlamingo2(AudioFlamingo):
    """This replica has several positions for each window, and another name for the encoder."""

    per_window = 3

    def _add_audio_transformer(self, module: nn.Module) -> None:
        self.audio_transformer_clap, self.clap_embed_dim = module, WIDTH

    def _transform(self, audio: Tensor) -> Tensor:
        return self.audio_transformer_clap(audio)


REPLICAS: dict[str, type[nn.Module]] = {
    "ultravox": Ultravox,
    "salmonn": Salmonn,
    "salmonn_2": Salmonn2,
    "ltu": Ltu,
    "qwen_audio": QwenAudio,
    "audio_flamingo": AudioFlamingo,
    "audio_flamingo_2": AudioFlamingo2,
}
