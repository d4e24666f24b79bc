"""The sidecar before a real vLLM: ``python -m tests.reliability vllm``, with ``vllm`` on the PATH.

A small Qwen2-Audio is served, and several sidecars ask it. The log-probabilities of every answer
must be those of the whole host with the adapter in one process. vLLM may be in an environment of
its own; in one that has both, ``python -m tests.reliability.served`` prints the schema of what a
turn sends.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import torch
import typer

from examples.serve_vllm import UpstreamError, embeds_part
from mal_kernels import ArgumentError
from mal_kernels.demo import small_host, train
from mal_kernels.store import MemoryStore
from tests.reliability.load import chat_request, recordings, small_sidecar, talk

STARTUP = 600.0  # seconds until the server must answer
WORDS = 30  # of the question: a prompt fills a block of 32, which vLLM keeps in its prefix cache
TOP = 5  # log-probabilities compared of each answer
OPTIONS = {"max_completion_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP}
# the demo's prompt: what the processor makes of small_host.PROMPT
TEMPLATE = """
{%- for message in messages %}{% for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}{% else %}MARKERS {% endif %}
{%- endfor %}{% endfor -%}
""".replace("MARKERS", "".join(small_host.MARKERS))

# what a turn may send on, and no more: an unknown field is an error here, unlike in vLLM
FIELDS = "model max_tokens max_completion_tokens temperature top_p seed n stream user cache_salt"
KEYWORDS = "type const anyOf items additionalProperties minimum maximum minLength maxLength"


# --- what vLLM says of a request ------------------------------------------------------------------


def chat_schema() -> dict[str, Any]:
    """JSON schema of a turn, from the request classes of the vLLM that is installed here."""
    from vllm import __version__  # type: ignore[import-not-found]
    from vllm.entrypoints.openai.chat_completion.protocol import (  # type: ignore[import-not-found]
        ChatCompletionRequest,
    )

    whole = ChatCompletionRequest.model_json_schema()
    known = whole["$defs"]
    audio = _only(
        known["ChatCompletionContentPartAudioEmbedsParam"], "type", "audio_embeds", "uuid"
    )
    text = _only(known["ChatCompletionContentPartTextParam"], "type", "text")
    message = _only(known["CustomChatCompletionMessageParam"], "role", "name")
    contents = [{"type": "string"}, {"type": "array", "items": {"anyOf": [audio, text]}}]
    message["properties"]["content"] = {"anyOf": contents}
    request = _only(whole, *FIELDS.split())
    request["properties"]["messages"] = {"type": "array", "items": message}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A chat request to vLLM with audio embeddings",
        "description": "What python -m tests.reliability.served prints of the request classes of "
        f"vLLM {__version__}, as far as a turn uses them; unlike there, unknown fields are errors.",
        **request,
    }


def _only(schema: dict[str, Any], *names: str) -> dict[str, Any]:
    """Of an object, these properties alone."""
    return {
        "type": "object",
        "required": schema["required"],
        "additionalProperties": False,
        "properties": {name: _bare(schema["properties"][name]) for name in names},
    }


def _bare(schema: Any) -> Any:
    """Without titles, descriptions and defaults."""
    if isinstance(schema, list):
        return [_bare(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _bare(schema[key]) for key in KEYWORDS.split() if key in schema}


# --- a server -------------------------------------------------------------------------------------


def save_model(folder: Path) -> Any:
    """The demo's host with two heads in place of four, with its processor; saved and returned.

    The attention of vLLM for CPUs is compiled for heads of 32 features, not of 16.
    """
    host, _ = train.load()
    text = host.config.text_config
    text.num_attention_heads = text.num_key_value_heads = 2
    changed = type(host)(host.config).eval().requires_grad_(False)
    changed.load_state_dict(host.state_dict())
    changed.save_pretrained(folder)
    small_host.build_processor().save_pretrained(folder)
    (folder / "turn.jinja").write_text(TEMPLATE)
    return changed


@contextmanager
def serving(folder: Path, executable: str = "vllm") -> Iterator[str]:
    """The address of a vLLM that serves the model in ``folder``.

    Raises:
        ArgumentError: there is no such executable, or it does not come up.
    """
    if shutil.which(executable) is None:
        raise ArgumentError(f"{executable} is not on the PATH; install vLLM, or add its bin to it.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"{executable} serve {folder} --served-model-name qwen2-audio --enable-mm-embeds"
    command += f" --host 127.0.0.1 --port {port} --dtype float32 --max-model-len 64 --block-size 32"
    command += f" --enforce-eager --chat-template {folder / 'turn.jinja'}"
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    log = folder / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command.split(), env=env, stdout=out, stderr=out, start_new_session=True
        )
    try:
        give_up = time.monotonic() + STARTUP
        while not _healthy(port):
            if server.poll() is not None or time.monotonic() > give_up:
                raise ArgumentError(f"{command}: {log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)  # its workers too


def _healthy(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


# --- its answers ----------------------------------------------------------------------------------


def served(
    dialogues: int,
    turns: int,
    *,
    executable: str = "vllm",
    workers: int = 2,
    on_turn: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """All dialogues at once, each turn by another of several sidecars in front of one vLLM.

    Args:
        dialogues: concurrent callers.
        turns: of each, at most 16.
        executable: of vLLM.
        workers: sidecars, which share a store.
        on_turn: called after each turn.

    Returns:
        How far the log-probabilities are from those of the whole host in one process, at most; how
        far they are from those without a memory, in the median (in a first turn there is none); and
        whether vLLM answers from its cache where a uuid comes again.
    """
    wavs = recordings(dialogues, turns)
    question = " ".join(["emotion"] * WORDS)

    def request(dialogue: int, turn: int) -> dict[str, Any]:
        return {**chat_request(dialogue, turn, wavs[dialogue][turn], question), **OPTIONS}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        host = save_model(folder)
        with serving(folder, executable) as url:
            backing = MemoryStore()
            sidecars = [small_sidecar(url, backing) for _ in range(workers)]
            answers = talk(sidecars, dialogues, turns, request, on_turn).answers
            cached = answered_from_the_cache(sidecars[0].vllm.post, question)
    _, mal = train.load()
    mal.attach(host)
    errors, effects = [], []
    for dialogue in range(dialogues):
        for turn in range(turns):
            inputs = prompt(wavs[dialogue][turn], question)
            with torch.no_grad():
                with mal.disable_adapter():
                    without = host(**inputs).logits[0, -1].log_softmax(-1)
                with mal.dialogue(f"call-{dialogue}", "AB"[turn % 2]):
                    alone = host(**inputs).logits[0, -1].log_softmax(-1)
            answer = log_probabilities(answers[dialogue, turn])
            errors.append(distance(answer, alone))
            effects.append(distance(answer, without))
    return {
        "executable": version_of(executable),
        "concurrent_dialogues": dialogues,
        "turns": len(answers),
        "sidecars": workers,
        "log_probability_error": max(errors),
        "median_effect_of_the_memory": statistics.median(effects),
        "a_uuid_again_is_answered_from_the_cache": cached,
    }


def prompt(wav: str, question: str) -> Any:
    """Inputs of the whole host for a turn."""
    import soundfile

    wave, _ = soundfile.read(io.BytesIO(base64.b64decode(wav)), dtype="float32")
    return small_host.prompt(small_host.build_processor(), [wave], question)


def log_probabilities(answer: Any) -> dict[int, float]:
    """Of the first token of an answer, by token id."""
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return {small_host.WORDS.index(x["token"].strip()): x["logprob"] for x in token["top_logprobs"]}


def distance(answer: dict[int, float], expected: torch.Tensor) -> float:
    """Largest difference to log-probabilities of the whole vocabulary."""
    return max(abs(value - float(expected[token])) for token, value in answer.items())


def answered_from_the_cache(post: Callable[[dict[str, Any]], Any], question: str) -> bool:
    """Whether other embeddings under a uuid that was seen before get the answer of the first.

    This is why a uuid is a digest of the embeddings.
    """
    request = {**chat_request(0, 0, "", question), **OPTIONS}
    del request["dialogue"], request["speaker"]
    draw = torch.Generator().manual_seed(0)
    parts = [
        embeds_part(torch.randn(8, small_host.WIDTH, generator=draw), str(i)) for i in range(2)
    ]
    parts.append({**parts[1], "uuid": parts[0]["uuid"]})

    def ask(part: dict[str, str]) -> dict[int, float]:
        asked = copy.deepcopy(request)
        asked["messages"][0]["content"][0] = part
        return log_probabilities(post(asked))

    first, second, again = map(ask, parts)
    if first == second:
        raise UpstreamError(200, b"vLLM answers two embeddings alike")
    return again == first


def version_of(executable: str) -> str:
    """As it prints it."""
    shown = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True)
    return f"vllm {shown.stdout.split()[-1]}"


def main() -> None:
    """Prints the schema of what a turn sends, from the vLLM that is installed here."""
    print(json.dumps(chat_schema(), indent=1))


if __name__ == "__main__":
    typer.run(main)
