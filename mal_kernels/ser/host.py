"""The frozen host: how it is asked, and what it makes of each turn's sound before any memory.

With ``site="embeds"`` all that comes before the memory is frozen: the input embeddings of the
decoder are computed once per turn (:func:`encode`) and kept (:class:`EncodedDialogue`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..dialogues.files import read_tensors, write_tensors
from ..errors import ArgumentError, HostError
from ..hosts import Host
from .corpora import SAMPLE_RATE, Corpus, Dialogue, Turn, read_audio

DEMO = "demo"  # the small Qwen2-Audio that ships with mal_kernels
INSTRUCTION = "Classify the emotion of the speaker. Options: {labels}. Answer with one word."
KIND = "encoded dialogue"
IGNORED = -100  # class of a turn that is not scored


@dataclass(frozen=True)
class Listener:
    """A host with what is needed to ask it for an emotion.

    Attributes:
        name: the demo, or the id of a model on the Hugging Face hub.
        model: the host, frozen, in eval mode.
        processor: text and sound → inputs of the model.
        prompt: the text of one turn, with the audio placeholder of the host.
        answers: token ids of each label's answer, in the order of the labels.
    """

    name: str
    model: nn.Module
    processor: Any
    prompt: str
    answers: tuple[tuple[int, ...], ...]

    def inputs(self, waves: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Model inputs that ask about each of ``waves``, one a row."""
        return self.processor(
            text=[self.prompt] * len(waves),
            audio=list(waves),
            sampling_rate=SAMPLE_RATE,
            padding=True,
            return_tensors="pt",
        )


def load_listener(
    name: str,
    labels: Sequence[str],
    *,
    instruction: str = INSTRUCTION,
    dtype: str = "auto",
    device: str = "cpu",
) -> Listener:
    """The demo's host, or one from the hub.

    The demo's host answers in its own words: low, neutral and high where those are the labels,
    else placeholders that make it good for dry runs only.

    Args:
        name: :data:`DEMO` or a model id.
        labels: what it shall answer.
        instruction: for hosts with a chat template; ``{labels}`` is filled in.
        dtype: of the host.
        device: where it runs.

    Raises:
        ArgumentError: the demo's host has too few words for ``labels``.
    """
    if name == DEMO:
        from ..demo import small_host, train

        model, _ = train.load()
        known = set(labels) <= set(small_host.ANSWERS["emotion"])
        words = list(labels) if known else list(small_host.ANSWERS["pitch"])[: len(labels)]
        if len(words) < len(labels):
            raise ArgumentError(f"labels has {len(labels)} entries, more than the demo's words.")
        answers = tuple((small_host.WORDS.index(word),) for word in words)
        prompt = small_host.PROMPT.format(task="emotion")
        return Listener(name, model, small_host.build_processor(), prompt, answers)
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForMultimodalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    prompt = chat_prompt(processor, instruction.format(labels=", ".join(labels)))
    tokens = [processor.tokenizer(word, add_special_tokens=False).input_ids for word in labels]
    return Listener(name, model.requires_grad_(False), processor, prompt, tuple(map(tuple, tokens)))


def chat_prompt(processor: Any, instruction: str) -> str:
    """One user message, sound then ``instruction``, in the host's own chat template."""
    content = [{"type": "audio", "audio": "turn.wav"}, {"type": "text", "text": instruction}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


# --- encoding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedTurn:
    """Input embeddings of the decoder ``[S, Dm]`` and which of them are audio, bool ``[S]``.

    No audio token at all: the turn has no sound, and keeps its place only.
    """

    embeds: Tensor
    audio: Tensor


@dataclass(frozen=True)
class EncodedDialogue:
    """A dialogue as the decoder gets it.

    Attributes:
        dialogue: where it comes from.
        turns: one per turn.
        speaker: index of each turn's speaker within the dialogue.
        label: class of each turn, :data:`IGNORED` where it is not scored.
    """

    dialogue: Dialogue
    turns: tuple[EncodedTurn, ...]
    speaker: tuple[int, ...]
    label: tuple[int, ...]

    @property
    def heard(self) -> tuple[bool, ...]:
        """Whether each turn has sound."""
        return tuple(bool(turn.audio.any()) for turn in self.turns)


class _Captured(Exception):
    """Ends a forward call of the host once the embeddings are known."""

    def __init__(self, embeds: Tensor) -> None:
        super().__init__()
        self.embeds = embeds


@torch.no_grad()
def encode(model: nn.Module, inputs: dict[str, Tensor]) -> list[EncodedTurn]:
    """Runs the host up to its decoder.

    Args:
        model: a host that :class:`mal_kernels.MALAdapter` knows.
        inputs: a batch from its processor, one clip a row.

    Returns:
        One entry per row, without padding, on the CPU.

    Raises:
        HostError: a host that cannot be given embeddings.
    """
    host = Host.of(model)
    if host.spec.encoder or host.spec.embeds_inside or host.spec.streaming:
        raise HostError(
            f"{type(model).__name__} does not take the embeddings of a turn; use a host whose "
            "decoder does, such as Qwen2-Audio."
        )

    def grab(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Captured(kwargs["inputs_embeds"])

    handle = host.site("embeds").register_forward_pre_hook(grab, with_kwargs=True)
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    try:
        model(**inputs)
    except _Captured as captured:
        embeds = captured.embeds.cpu()
    finally:
        handle.remove()
    audio, there = host.audio(inputs).cpu(), inputs["attention_mask"].bool().cpu()
    return [
        EncodedTurn(row[keep].clone(), a[keep])
        for row, a, keep in zip(embeds, audio, there, strict=True)
    ]


class _Sounds(torch.utils.data.Dataset[Any]):
    """Reads the sound of turn after turn; in workers."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.turns = turns

    def __len__(self) -> int:
        return len(self.turns)

    def __getitem__(self, index: int) -> np.ndarray | None:
        return read_audio(self.turns[index])


class _Collate:
    """Waves → inputs of the host, and which rows have sound. Holds no model: workers copy it."""

    def __init__(self, listener: Listener) -> None:
        self.listener = Listener(
            listener.name, nn.Identity(), listener.processor, listener.prompt, listener.answers
        )

    def __call__(self, waves: list[np.ndarray | None]) -> tuple[list[bool], dict[str, Tensor]]:
        heard = [wave is not None for wave in waves]
        silence = np.zeros(SAMPLE_RATE // 2, np.float32)
        sounds = [silence if wave is None else wave for wave in waves]
        return heard, dict(self.listener.inputs(sounds))


def encode_corpus(
    listener: Listener,
    corpus: Corpus,
    folder: Path | None = None,
    *,
    batch: int = 64,
    workers: int = 0,
    on_turn: Callable[[int], object] = lambda turns: None,
) -> list[EncodedDialogue]:
    """Encodes every turn of ``corpus``, or reads what an earlier call has left in ``folder``.

    Args:
        listener: the host.
        corpus: what to encode.
        folder: keeps one file per dialogue; an interrupted call goes on where it stopped.
        batch: turns in one call of the host.
        workers: processes that read and render audio.
        on_turn: called with the number of turns done.
    """
    place = None if folder is None else folder / _key(listener, corpus)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    done: dict[str, list[EncodedTurn]] = {}
    for dialogue in corpus.dialogues:
        path = _file(place, dialogue)
        if path is not None and path.exists():
            done[dialogue.id] = _load(path)
            on_turn(len(dialogue.turns))
    missing = [d for d in corpus.dialogues if d.id not in done]
    stream = _encode_turns(listener, [t for d in missing for t in d.turns], batch, workers)
    for dialogue in missing:
        turns = []
        for _ in dialogue.turns:
            turns.append(next(stream))
            on_turn(1)
        path = _file(place, dialogue)
        if path is not None:
            _save(path, turns)
        done[dialogue.id] = turns
    classes = {label: i for i, label in enumerate(corpus.labels)}
    return [_with_classes(d, done[d.id], classes) for d in corpus.dialogues]


def _with_classes(
    dialogue: Dialogue, turns: Sequence[EncodedTurn], classes: dict[str, int]
) -> EncodedDialogue:
    names = list(dict.fromkeys(turn.speaker for turn in dialogue.turns))
    label = tuple(
        classes[turn.label] if turn.label is not None and bool(encoded.audio.any()) else IGNORED
        for turn, encoded in zip(dialogue.turns, turns, strict=True)
    )
    speaker = tuple(names.index(turn.speaker) for turn in dialogue.turns)
    return EncodedDialogue(dialogue, tuple(turns), speaker, label)


def _encode_turns(listener: Listener, turns: Sequence[Turn], batch: int, workers: int) -> Any:
    loader = torch.utils.data.DataLoader(
        _Sounds(turns),
        batch_size=batch,
        num_workers=workers,
        collate_fn=_Collate(listener),
        multiprocessing_context="spawn" if workers else None,  # a fork shares torch's threads
    )
    for heard, inputs in loader:
        for is_heard, turn in zip(heard, encode(listener.model, inputs), strict=True):
            yield turn if is_heard else EncodedTurn(turn.embeds, torch.zeros_like(turn.audio))


def _key(listener: Listener, corpus: Corpus) -> str:
    """A folder name that changes with everything that the embeddings depend on."""
    first = [p.detach().flatten()[:8].float().cpu() for p in listener.model.parameters()]
    weights = hashlib.sha256(torch.cat(first).numpy().tobytes()).hexdigest()
    about = json.dumps([listener.name, listener.prompt, corpus.name, weights])
    return f"{corpus.name.replace(' ', '-')}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def _file(place: Path | None, dialogue: Dialogue) -> Path | None:
    if place is None:
        return None
    return place / f"{dialogue.id.replace('/', '_')}.safetensors"


def _save(path: Path, turns: Sequence[EncodedTurn]) -> None:
    tensors = {
        "embeds": torch.cat([turn.embeds for turn in turns]),
        "audio": torch.cat([turn.audio for turn in turns]),
        "lengths": torch.tensor([len(turn.audio) for turn in turns]),
    }
    write_tensors(path, KIND, tensors, {})


def _load(path: Path) -> list[EncodedTurn]:
    tensors, _ = read_tensors(path, KIND)
    lengths = tensors["lengths"].tolist()
    parts = (torch.split(tensors[name], lengths) for name in ("embeds", "audio"))
    return [EncodedTurn(*pair) for pair in zip(*parts, strict=True)]
