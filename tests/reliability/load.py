"""The sidecar of ``examples/serve_vllm.py`` under load, before a server that plays vLLM.

That server checks every request against the recorded schema, decodes the embeddings as vLLM does,
keeps them by their uuid as vLLM's cache does, and answers with a digest of what it has: an answer
tells exactly which dialogue's memory was in the embeddings.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from examples.serve_vllm import CHAT, VLLM, Server, Sidecar
from mal_kernels import MALAdapter
from mal_kernels.demo import small_host, synth, train
from mal_kernels.store import KeyValueStore, MemoryStore
from tests.reliability.heap import allocated_mib, by_fifths, resident_mib, trimmed_mib
from tests.reliability.soak import percentiles

CACHE = 2**20  # bytes of states in each sidecar; the rest is in the store
SCHEMA = Path(__file__).parents[1] / "golden" / "vllm_chat_request.json"


class PlayedVLLM(ThreadingHTTPServer):
    """Plays vLLM on loopback; ``fail`` of the requests to come are refused with 500."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

        super().__init__(("127.0.0.1", 0), _Handler)
        self.validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
        self.cache: dict[str, bytes] = {}
        self.requests, self.fail = 0, 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Of this server."""
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, request: Any) -> tuple[int, dict[str, Any]]:
        """Status and body for a request."""
        with self.lock:
            self.requests += 1
            if self.fail:
                self.fail -= 1
                return 500, {"error": "a planted failure"}
        wrong = [error.message for error in self.validator.iter_errors(request)]
        parts = [part for message in request["messages"] for part in message["content"]]
        (part,) = (part for part in parts if part["type"] == "audio_embeds")
        data = io.BytesIO(base64.b64decode(part["audio_embeds"], validate=True))
        embeds = torch.load(data, weights_only=True)
        if wrong or embeds.dim() != 2 or not embeds.is_floating_point():
            return 400, {"error": wrong or f"embeddings {list(embeds.shape)}"}
        content = embeds.numpy().tobytes()
        if self.cache.setdefault(part["uuid"], content) != content:
            return 500, {"error": "a uuid for two contents"}
        digest = hashlib.sha256(self.cache[part["uuid"]]).hexdigest()
        choice = {"index": 0, "message": {"role": "assistant", "content": digest}}
        return 200, {"object": "chat.completion", "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    server: PlayedVLLM

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        status, answer = self.server.answer(json.loads(self.rfile.read(length)))
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def small_sidecar(url: str, backing: KeyValueStore | None) -> Sidecar:
    """Of the demo's Qwen2-Audio and its trained adapter."""
    host, _ = train.load()
    vllm = VLLM(
        host.model.audio_tower, host.model.multi_modal_projector, small_host.WIDTH, url
    ).eval()
    weights = Path(train.__file__).parent / "weights"
    mal = MALAdapter.from_pretrained(weights).attach(vllm)
    mal.dialogues.backing = backing
    return Sidecar(mal, vllm, small_host.build_feature_extractor())


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[ThreadingHTTPServer]:
    """Serves in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def recordings(dialogues: int, turns: int) -> list[list[str]]:
    """WAV files in base64, by dialogue and turn."""
    import soundfile

    draw = np.random.default_rng(0)
    waves = synth.render_script(draw, synth.sample(draw, dialogues))[:, :turns]
    files: list[list[str]] = []
    for dialogue in waves:
        files.append([])
        for wave in dialogue:
            data = io.BytesIO()
            soundfile.write(data, wave, synth.SAMPLE_RATE, format="WAV")
            files[-1].append(base64.b64encode(data.getvalue()).decode())
    return files


def chat_request(
    dialogue: int, turn: int, wav: str, question: str = "How does the speaker feel?"
) -> dict[str, Any]:
    """One turn, of one of two speakers."""
    audio = {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}}
    return {
        "model": "qwen2-audio",
        "max_completion_tokens": 8,
        "dialogue": f"call-{dialogue}",
        "speaker": "AB"[turn % 2],
        "messages": [{"role": "user", "content": [audio, {"type": "text", "text": question}]}],
    }


def post(port: int, request: Any, path: str = CHAT, method: str = "POST") -> tuple[int, Any]:
    """Status and parsed body of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = request if isinstance(request, bytes) else json.dumps(request)
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


class Talk(NamedTuple):
    """Answers by dialogue and turn; milliseconds, and MiB after each, as they came."""

    answers: dict[tuple[int, int], Any]
    times: list[float]
    resident: list[float]
    allocated: list[float]


def talk(
    sidecars: Sequence[Sidecar],
    dialogues: int,
    turns: int,
    request: Callable[[int, int], Any],
    on_turn: Callable[[], object],
) -> Talk:
    """All dialogues at once, each turn by another of the sidecars.

    Args:
        sidecars: each gets a server of its own.
        dialogues: concurrent callers.
        turns: of each.
        request: of a dialogue and a turn.
        on_turn: called after each turn.
    """
    servers = [Server(sidecar, "127.0.0.1", 0) for sidecar in sidecars]
    done = Talk({}, [], [], [])

    def call(dialogue: int) -> None:
        for turn in range(turns):
            port = servers[(dialogue + turn) % len(servers)].server_port
            start = time.perf_counter()
            status, answer = post(port, request(dialogue, turn))
            done.times.append(1000 * (time.perf_counter() - start))
            if status != 200:
                raise AssertionError(f"status {status}: {answer}")
            done.answers[dialogue, turn] = answer
            done.resident.append(resident_mib())
            done.allocated.append(allocated_mib())
            on_turn()

    with ExitStack() as stack, ThreadPoolExecutor(dialogues) as pool:
        for server in servers:
            stack.enter_context(running(server))
        list(pool.map(call, range(dialogues)))
    return done


def load(
    dialogues: int,
    turns: int,
    *,
    backing: KeyValueStore | None = None,
    workers: int = 2,
    on_turn: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """The talk of many dialogues with sidecars that share a store, before a played vLLM.

    Args:
        dialogues: concurrent callers.
        turns: of each, at most 16.
        backing: of all sidecars; a store in memory if ``None``.
        workers: sidecars.
        on_turn: called after each turn.

    Returns:
        Latencies, memory, and how many answers are not those of a sidecar alone.
    """
    wavs = recordings(dialogues, turns)

    def request(dialogue: int, turn: int) -> dict[str, Any]:
        return chat_request(dialogue, turn, wavs[dialogue][turn])

    played = PlayedVLLM()
    with running(played):
        backing = backing or MemoryStore()
        sidecars = [small_sidecar(played.url, backing) for _ in range(workers)]
        for sidecar in sidecars:
            sidecar.mal.dialogues.max_bytes = CACHE
        done = talk(sidecars, dialogues, turns, request, on_turn)
        trimmed = trimmed_mib()
        alone = small_sidecar(played.url, None)
        wrong = 0
        for dialogue, turn in sorted(done.answers):
            wrong += alone.chat(request(dialogue, turn)) != done.answers[dialogue, turn]
    return {
        "concurrent_dialogues": dialogues,
        "turns": len(done.answers),
        "sidecars": workers,
        "cache_mib": CACHE / 2**20,
        "turn_ms": percentiles(sorted(done.times)),
        "resident_mib_by_fifth_of_the_turns": by_fifths(done.resident),
        "allocated_mib_by_fifth_of_the_turns": by_fifths(done.allocated),
        "resident_mib_after_malloc_trim": round(trimmed, 1),
        "answers_with_another_memory": wrong,
    }
