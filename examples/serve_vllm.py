"""A memory of each call, in front of a stock vLLM server that knows nothing of it.

    vllm serve Qwen/Qwen2-Audio-7B-Instruct --enable-mm-embeds
    python examples/serve_vllm.py --adapter my-mal --store redis://localhost:6379/0

The sidecar runs the encoder, the projector and the memory, and sends vLLM the audio embeddings with
the memory's residual in them. It is called as vLLM is, with one ``input_audio`` part (WAV or FLAC)
and two fields more:

    curl localhost:8100/v1/chat/completions -d '{"model": "...", "dialogue": "call-17",
      "speaker": "A", "messages": [{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"data": "UklGR...", "format": "wav"}},
        {"type": "text", "text": "How does the speaker feel?"}]}]}'
    curl -X DELETE localhost:8100/v1/dialogues/call-17

To the adapter, vLLM is a host whose decoder is a request: a turn that vLLM does not answer is not
written. With a Redis store any number of sidecars may take any turn. Like vLLM, the sidecar trusts
its network: put what checks callers and encrypts in front of it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import traceback
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
import typer
from torch import Tensor, nn

from mal_kernels import (
    ArgumentError,
    AudioFileError,
    CheckpointError,
    HostError,
    HostSpec,
    MALAdapter,
    MALError,
    register_host,
)
from mal_kernels.adapter.hub import find_file
from mal_kernels.errors import StoreError
from mal_kernels.store import DirectoryStore, KeyValueStore, RedisStore

MAX_BODY = 64 * 2**20  # bytes; 30 s of 48 kHz stereo float32 are 11.5 MB, 15.4 MB in base64
CHAT, DIALOGUES = "/v1/chat/completions", "/v1/dialogues/"


class UpstreamError(Exception):
    """vLLM refused, failed or did not answer; its status and words."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"vLLM answered {status}")
        self.status, self.body = status, body


class VLLM(nn.Module):
    """A vLLM server as a host: encoder and projector here, everything after them there.

    Args:
        encoder: called with features ``[1, mels, frames]``, returns ``[1, T', D]``.
        projector: from there to ``[1, T', Dm]``.
        hidden_size: ``Dm``.
        url: of the server.
        timeout: seconds after which an answer is given up.
    """

    encoder: Any  # its class belongs to transformers

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        hidden_size: int,
        url: str,
        timeout: float = 120.0,
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.timeout = encoder, projector, timeout
        self.config = SimpleNamespace(model_type="vllm", hidden_size=hidden_size)
        self.url = urlsplit(url)

    def embed(self, features: Tensor, mask: Tensor) -> Tensor:
        """Returns what Qwen2-Audio puts in place of a clip's placeholders, ``[1, T, Dm]``.

        Args:
            features: log-mel, ``[1, mels, frames]``, padded to the encoder's window.
            mask: which frames are audio, ``[1, frames]``.
        """
        from transformers.masking_utils import create_bidirectional_mask

        heard, tokens = self.encoder._get_feat_extract_output_lengths(mask.sum(-1))
        weight = next(self.encoder.parameters())
        frames = torch.arange((features.shape[-1] - 2) // 2 + 1, device=weight.device)
        attention = create_bidirectional_mask(
            config=self.encoder.config,
            inputs_embeds=weight.new_zeros(1, len(frames), 1),
            attention_mask=(frames < heard.to(weight.device)).long()[None],
        )
        hidden = self.encoder(features.to(weight), attention_mask=attention).last_hidden_state
        return self.projector(hidden)[:, : int(tokens)]

    def forward(self, inputs_embeds: Tensor, ask: Callable[[Tensor], dict[str, Any]]) -> Any:
        """vLLM's answer to the request that ``ask`` makes of the embeddings ``[T, Dm]``."""
        return self.post(ask(inputs_embeds[0]))

    def post(self, request: dict[str, Any]) -> Any:
        """The answer, parsed.

        Raises:
            UpstreamError: there is none.
        """
        connect = HTTPSConnection if self.url.scheme == "https" else HTTPConnection
        connection = connect(self.url.netloc, timeout=self.timeout)
        try:
            head = {"Content-Type": "application/json"}
            connection.request("POST", self.url.path + CHAT, json.dumps(request), head)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise UpstreamError(response.status, body)
            return json.loads(body)
        except (OSError, HTTPException, ValueError) as error:
            raise UpstreamError(502, json.dumps({"error": f"vLLM: {error}"}).encode()) from error
        finally:
            connection.close()


# every position of every call is audio
register_host(
    HostSpec(
        "vllm",
        audio_inputs=("inputs_embeds",),
        audio_token=None,
        streaming=True,
        decoder=lambda model: model,
        min_clip_tokens=1,
    )
)


class Sidecar:
    """Turns of dialogues, each a chat request; safe to call from several threads.

    Args:
        mal: attached to ``vllm``.
        vllm: the host.
        extractor: the feature extractor of the model.
    """

    def __init__(self, mal: MALAdapter, vllm: VLLM, extractor: Any) -> None:
        self.mal, self.vllm, self.extractor = mal, vllm, extractor

    @torch.no_grad()
    def chat(self, request: Any) -> Any:
        """Answers one turn, and remembers it if vLLM has answered.

        Args:
            request: as for vLLM's chat completions, with one ``input_audio`` part, the id of the
                ``dialogue`` and, if known, the ``speaker``.

        Raises:
            ArgumentError: the request lacks something, or asks for a stream.
            AudioFileError: its audio cannot be read.
            HostError: the encoder made embeddings of it that are not finite.
            StoreError: the store failed, or the dialogue has another turn under way.
            UpstreamError: vLLM did not answer.
        """
        dialogue, speaker, audio, fill = parse(request)
        wave = read_audio(audio, self.extractor.sampling_rate)
        inputs = self.extractor(
            wave,
            sampling_rate=self.extractor.sampling_rate,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        embeds = self.vllm.embed(inputs["input_features"], inputs["attention_mask"])
        if not embeds.shape[1]:
            raise AudioFileError(
                f"input_audio has {len(wave)} samples, too few for one audio token; send a turn of "
                "at least a tenth of a second."
            )
        with self.mal.dialogue(dialogue, speaker) as opened:
            turn = f"{dialogue}\0{opened.turns[0]}"
            return self.vllm(
                inputs_embeds=embeds, ask=lambda changed: fill(embeds_part(changed, turn))
            )

    def forget(self, dialogue: str) -> None:
        """Erases a dialogue here and in the store."""
        self.mal.dialogues.forget([dialogue])


def embeds_part(embeds: Tensor, turn: str) -> dict[str, str]:
    """Audio embeddings ``[T, Dm]`` as a part of a message to vLLM.

    Its uuid, by which vLLM caches, is a digest of the dialogue, the turn and the embeddings: two
    parts of the same uuid are the same, so that no cache can return another caller's memory.

    Raises:
        HostError: some are not finite, which vLLM can pass on to other callers in its caches.
    """
    embeds = embeds.detach().cpu().contiguous()
    if not embeds.isfinite().all():
        raise HostError(
            "the audio embeddings of this turn are not all finite, so they were not sent; check "
            "the weights of the encoder, and its dtype (--device cpu computes in that of the file)."
        )
    data = io.BytesIO()
    torch.save(embeds.clone(), data)  # a clone: views are saved with all that they are views of
    content = embeds.view(torch.uint8).numpy().tobytes()
    return {
        "type": "audio_embeds",
        "audio_embeds": base64.b64encode(data.getvalue()).decode(),
        "uuid": hashlib.sha256(turn.encode("utf-8", "surrogatepass") + b"\0" + content).hexdigest(),
    }


def read_audio(audio: Any, rate: int) -> np.ndarray:
    """The samples of an ``input_audio`` object, mono float32 at ``rate``, at most 30 s.

    Raises:
        AudioFileError: not base64, not audio, empty, too long, or not finite.
    """
    import soundfile
    import soxr

    try:
        data = base64.b64decode(audio["data"], validate=True)
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            seconds = file.frames / file.samplerate  # the encoder hears 30 s
            if not (0 < seconds <= 30 and file.channels <= 8 and 4000 <= file.samplerate <= 384000):
                raise AudioFileError(
                    f"input_audio is {seconds:.1f} s of {file.channels} channels at "
                    f"{file.samplerate} Hz; send one turn of at most 30 s and 8 channels, at 4 to "
                    "384 kHz."
                )
            wave = file.read(dtype="float32", always_2d=True).mean(1)
            if file.samplerate != rate:
                wave = soxr.resample(wave, file.samplerate, rate)
    except AudioFileError:
        raise
    except (KeyError, TypeError, ValueError, soundfile.SoundFileError) as error:
        raise AudioFileError(
            f"input_audio cannot be read ({error!r}); send WAV, FLAC or OGG in base64 as its data."
        ) from error
    if not len(wave) or not np.isfinite(wave).all():
        raise AudioFileError("input_audio has no samples, or some that are not finite numbers.")
    return wave


def parse(request: Any) -> tuple[str, str | None, Any, Callable[[Any], dict[str, Any]]]:
    """The dialogue, the speaker, the audio, and what goes on to vLLM given a part in its place.

    Raises:
        ArgumentError: the request lacks something, or asks for a stream.
    """
    if not isinstance(request, dict) or request.get("stream"):
        raise ArgumentError("request: send a JSON object, without stream.")
    dialogue, speaker = request.get("dialogue"), request.get("speaker")
    if not isinstance(dialogue, str) or not (speaker is None or isinstance(speaker, str)):
        raise ArgumentError(
            f"dialogue is {dialogue!r} and speaker {speaker!r}; send the id of the dialogue as a "
            "string, and the speaker as another, or none."
        )
    messages = request.get("messages")
    messages = list(messages) if isinstance(messages, list) else []
    contents: list[Any] = [m.get("content") if isinstance(m, dict) else None for m in messages]
    parts = [
        (i, j, part.get("input_audio"))
        for i, content in enumerate(contents)
        for j, part in enumerate(content if isinstance(content, list) else ())
        if isinstance(part, dict) and part.get("type") == "input_audio"
    ]
    if len(parts) != 1:
        raise ArgumentError(
            f"messages have {len(parts)} input_audio parts; send the one that was said in this "
            "turn. What came before is in the memory."
        )
    ((i, j, audio),) = parts

    def fill(part: Any) -> dict[str, Any]:
        content = [*contents[i][:j], part, *contents[i][j + 1 :]]
        rest = {key: x for key, x in request.items() if key not in ("dialogue", "speaker")}
        filled = [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]
        return {**rest, "messages": filled}

    return dialogue, speaker, audio, fill


# --- HTTP -----------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A sidecar's server runs a thread per connection; port 0 takes a free one."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, sidecar: Sidecar, host: str, port: int) -> None:
        self.sidecar = sidecar
        super().__init__((host, port), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers errors with their status: 400 of the caller, 503 of the store, vLLM's as they are."""

    server: Server
    timeout = 60  # seconds to send a request

    def do_GET(self) -> None:
        """``/health``."""
        self._answer(lambda: {"status": "ok"} if self.path == "/health" else None)

    def do_POST(self) -> None:
        """A turn."""
        self._answer(lambda: self.server.sidecar.chat(self._body()) if self.path == CHAT else None)

    def do_DELETE(self) -> None:
        """Erases a dialogue."""
        self._answer(self._forget)

    def _forget(self) -> dict[str, str] | None:
        name = self.path.removeprefix(DIALOGUES)
        if name == self.path:
            return None
        self.server.sidecar.forget(unquote(name))
        return {"status": "forgotten"}

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            raise ArgumentError(f"Content-Length is {length!r}; send up to {MAX_BODY} bytes.")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"the body is not JSON: {error}") from error

    def _answer(self, handle: Callable[[], Any]) -> None:
        try:
            answer = handle()
            status = 404 if answer is None else 200
            body = json.dumps({"error": "not found"} if answer is None else answer).encode()
        except UpstreamError as error:
            status, body = error.status, error.body
        except MALError as error:
            status = 503 if isinstance(error, (CheckpointError, StoreError)) else 400
            body = json.dumps({"error": str(error)}).encode()
        except Exception:
            traceback.print_exc()
            status, body = 500, b'{"error": "internal error; the turn was not written"}'
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: an id in a path may be personal."""


# --- the encoder half of a checkpoint -------------------------------------------------------------


def load_encoder(model_id: str, url: str, device: str = "cpu") -> VLLM:
    """The encoder and the projector of a Qwen2-Audio checkpoint; its decoder is never read.

    Raises:
        CheckpointError: a file or a weight of them is missing.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, Qwen2AudioForConditionalGeneration

    config = AutoConfig.from_pretrained(model_id)
    with torch.device("meta"):
        whole = Qwen2AudioForConditionalGeneration(config).model
    parts = {name: getattr(whole, name) for name in ("audio_tower", "multi_modal_projector")}
    try:
        index = json.loads(find_file(model_id, "model.safetensors.index.json", {}).read_text())
        shards = sorted({f for key, f in index["weight_map"].items() if _part(key, parts)})
    except (CheckpointError, OSError):
        shards = ["model.safetensors"]
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
    for shard in shards:
        with safe_open(find_file(model_id, shard, {}), framework="pt", device=device) as file:
            for key in file.keys():  # noqa: SIM118
                if name := _part(key, parts):
                    weights[name][key.split(f"{name}.", 1)[1]] = file.get_tensor(key)
    for name, part in parts.items():
        lacking = part.state_dict().keys() - weights[name].keys()
        if lacking:
            raise CheckpointError(f"{model_id} has no weights for {name}: {sorted(lacking)[:3]} …")
        part.load_state_dict(weights[name], strict=False, assign=True)
    encoder, projector = parts.values()
    return VLLM(encoder, projector, config.text_config.hidden_size, url).eval()


def _part(key: str, parts: dict[str, nn.Module]) -> str | None:
    return next((name for name in parts if f"{name}." in key), None)


def open_store(address: str) -> KeyValueStore:
    """Redis at a URL, or a folder."""
    return RedisStore(address) if "://" in address else DirectoryStore(address)


def main(
    adapter: Annotated[str, typer.Option(help="Folder or hub id of a trained adapter.")],
    model: Annotated[str, typer.Option(help="The checkpoint that vLLM serves.")] = (
        "Qwen/Qwen2-Audio-7B-Instruct"
    ),
    vllm: Annotated[str, typer.Option(help="Address of vLLM.")] = "http://localhost:8000",
    store: Annotated[str, typer.Option(help="redis://… or a folder.")] = "dialogues",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8100,
    device: Annotated[str, typer.Option(help="Of encoder, projector and memory.")] = "cpu",
    memory_mib: Annotated[int, typer.Option(help="States cached in this process.")] = 1024,
) -> None:
    """Serve."""
    from transformers import AutoFeatureExtractor

    sidecar = load_encoder(model, vllm, device)
    mal = MALAdapter.from_pretrained(Path(adapter) if Path(adapter).is_dir() else adapter)
    mal.attach(sidecar)
    mal.dialogues.backing = open_store(store)
    mal.dialogues.max_bytes = memory_mib * 2**20
    server = Server(Sidecar(mal, sidecar, AutoFeatureExtractor.from_pretrained(model)), host, port)
    print(f"serving {CHAT} at http://{host}:{server.server_port}")
    server.serve_forever()


if __name__ == "__main__":
    typer.run(main)
