"""The sidecar before vLLM: the same embeddings as in process, the request, faults, many callers."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import soundfile
import torch

from examples.serve_vllm import (
    VLLM,
    Server,
    UpstreamError,
    embeds_part,
    load_encoder,
    open_store,
    read_audio,
)
from mal_kernels import ArgumentError, AudioFileError, CheckpointError, MALAdapter
from mal_kernels.demo import small_host, train
from mal_kernels.errors import HostError, StoreError
from mal_kernels.store import DirectoryStore, MemoryStore, RedisStore
from tests.reliability.load import (
    PlayedVLLM,
    chat_request,
    load,
    post,
    recordings,
    running,
    small_sidecar,
)
from tests.reliability.served import TEMPLATE, distance, log_probabilities, serving
from tests.support.dialogues import equal


@pytest.fixture
def played():
    with running(PlayedVLLM()) as server:
        yield server


@pytest.fixture(scope="module")
def wavs():
    return recordings(2, 4)


def decoded(wav: str) -> np.ndarray:
    return soundfile.read(io.BytesIO(base64.b64decode(wav)), dtype="float32")[0]


def test_the_embeddings_sent_are_those_that_the_whole_host_would_use(played, wavs):
    sidecar = small_sidecar(played.url, None)
    host, mal = train.load()
    mal.attach(host)
    processor, seen, sent = small_host.build_processor(), [], []
    embeds_of = host.model.language_model
    hook = embeds_of.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    sidecar.vllm.post = lambda request: sent.append(request)  # what vLLM gets
    for turn, wav in enumerate(wavs[0]):
        inputs = small_host.prompt(processor, [decoded(wav)])
        with torch.no_grad(), mal.dialogue("call-0", "AB"[turn % 2]):
            host(**inputs)
        sidecar.chat(chat_request(0, turn, wav))
        audio = inputs["input_ids"][0] == host.config.audio_token_id
        part = sent[-1]["messages"][0]["content"][0]
        data = io.BytesIO(base64.b64decode(part["audio_embeds"]))
        assert torch.equal(torch.load(data, weights_only=True), seen[-1][0, audio])
    hook.remove()
    for who in (None, "A", "B"):
        here = sidecar.mal.dialogues.latest("call-0").states[who]
        assert equal(here, mal.dialogues.latest("call-0").states[who])


def test_uuids_tell_dialogues_turns_and_memories_apart():
    x = torch.randn(3, 4)
    one = embeds_part(x, "a\0" + "0")
    assert embeds_part(x.clone(), "a\0" + "0") == one
    others = [
        embeds_part(x, "a\0" + "1"),
        embeds_part(x, "b\0" + "0"),
        embeds_part(x + 1, "a\0" + "0"),
    ]
    assert len({part["uuid"] for part in (one, *others)}) == 4
    view = embeds_part(torch.randn(1000, 4)[:3], "a")
    assert len(view["audio_embeds"]) == len(one["audio_embeds"])  # not all that it is a view of
    embeds_part(x.bfloat16(), "a")


def test_embeddings_that_are_not_finite_are_not_sent(played, wavs):
    sidecar = small_sidecar(played.url, MemoryStore())
    with torch.no_grad():
        sidecar.vllm.projector.linear.bias[0] = float("inf")
    with pytest.raises(HostError, match="not all finite"):
        sidecar.chat(chat_request(0, 0, wavs[0][0]))
    assert played.requests == 0
    assert sidecar.mal.dialogues.backing.values == {}


def test_a_turn_that_vllm_does_not_answer_is_not_written(played, wavs):
    sidecar = small_sidecar(played.url, MemoryStore())
    request = chat_request(0, 0, wavs[0][0])
    played.fail = 1
    with pytest.raises(UpstreamError) as failed:
        sidecar.chat(request)
    assert failed.value.status == 500
    assert sidecar.mal.dialogues.backing.values == {}
    answer = sidecar.chat(request)  # the request is as it was
    assert answer["choices"][0]["message"]["content"]
    assert len(sidecar.mal.dialogues.latest("call-0").clips) == 1
    sidecar.vllm.url = sidecar.vllm.url._replace(netloc="127.0.0.1:1")
    with pytest.raises(UpstreamError, match="502"):
        sidecar.chat(chat_request(0, 1, wavs[0][1]))
    assert len(sidecar.mal.dialogues.latest("call-0").clips) == 1


def test_statuses(played, wavs):
    sidecar = small_sidecar(played.url, MemoryStore())
    with running(Server(sidecar, "127.0.0.1", 0)) as server:
        port = server.server_port
        good = chat_request(0, 0, wavs[0][0])
        assert post(port, None, "/health", "GET") == (200, {"status": "ok"})
        assert post(port, None, "/x", "GET")[0] == 404
        assert post(port, good)[0] == 200
        for bad, match in (
            (b"{", "not JSON"),
            (b'{"a":' * 100_000, "not JSON"),
            ([], "JSON object"),
            ({**good, "stream": True}, "without stream"),
            ({**good, "dialogue": 3}, "dialogue is 3"),
            ({**good, "messages": good["messages"] * 2}, "2 input_audio parts"),
            ({**good, "messages": "x"}, "0 input_audio parts"),
            (chat_request(0, 0, "UklGRg=="), "cannot be read"),
        ):
            status, answer = post(port, bad)
            assert status == 400
            assert match in answer["error"]
        assert len(sidecar.mal.dialogues.latest("call-0").clips) == 1
        status, answer = post(port, {**good, "unknown": 1})
        assert status == 400  # vLLM's own words
        assert "unknown" in str(answer["error"])
        assert post(port, None, "/v1/dialogues/call-0", "DELETE")[0] == 200
        assert sidecar.mal.dialogues.backing.values == {}
        sidecar.mal.dialogues.backing.put("call-0", b"damaged")
        assert post(port, good)[0] == 503


def test_many_callers_at_once_and_any_sidecar_takes_any_turn(redis_url):
    result = load(6, 3, backing=RedisStore(redis_url, prefix="load:"))
    assert result["turns"] == 18
    assert result["answers_with_another_memory"] == 0


def test_a_redis_that_goes_away_fails_the_turn_and_nothing_else(played, wavs):
    sidecar = small_sidecar(played.url, RedisStore("redis://127.0.0.1:1/0"))
    with pytest.raises(StoreError, match="Redis refused get"):
        sidecar.chat(chat_request(0, 0, wavs[0][0]))
    assert played.requests == 0


def test_recordings_are_checked():
    def wav(samples, rate=16000, channels=1) -> dict:
        data = io.BytesIO()
        soundfile.write(data, np.zeros((samples, channels)), rate, format="WAV")
        return {"data": base64.b64encode(data.getvalue()).decode()}

    assert len(read_audio(wav(4410, 44100, 2), 16000)) == 1600
    for audio, match in (
        (wav(0), "0.0 s"),
        (wav(31 * 16000), "31.0 s"),
        (wav(100, 16000, 9), "9 channels"),
        (wav(100, 1000), "1000 Hz"),
        ({"data": "é"}, "cannot be read"),
        (None, "cannot be read"),
        ({}, "cannot be read"),
    ):
        with pytest.raises(AudioFileError, match=match):
            read_audio(audio, 16000)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_only_the_encoder_half_of_a_checkpoint_is_loaded(tmp_path, shard):
    host = small_host.build_host()
    host.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    vllm = load_encoder(str(tmp_path), "http://localhost:8000")
    assert not any(parameter.is_meta for parameter in vllm.parameters())
    mine, theirs = vllm.encoder.state_dict(), host.model.audio_tower.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    weight = host.model.multi_modal_projector.linear.weight
    assert torch.equal(vllm.projector.linear.weight, weight)
    MALAdapter().attach(vllm)
    assert isinstance(vllm, VLLM)


def test_an_encoder_without_weights(tmp_path):
    from safetensors.torch import save_file

    host = small_host.build_host()
    host.config.save_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no weights for audio_tower"):
        load_encoder(str(tmp_path), "http://localhost:8000")


def test_stores_by_address(tmp_path):
    assert isinstance(open_store(str(tmp_path / "calls")), DirectoryStore)
    assert isinstance(open_store("redis://localhost:6379/0"), RedisStore)
    with pytest.raises(ArgumentError):
        open_store("http://localhost")


def test_the_recorded_schema_is_strict(played):
    part = {"type": "audio_embeds", "audio_embeds": "", "uuid": "x"}
    message = {"role": "user", "content": [part]}
    ok = {"messages": [message]}
    assert not list(played.validator.iter_errors(ok))
    for bad in (
        {},
        {"messages": {}},
        {**ok, "dialogue": "a"},
        {"messages": [{"role": "user", "content": [{**part, "type": "input_audio"}]}]},
        {"messages": [{"role": "user", "content": [{**part, "uuid": 3}]}]},
    ):
        assert list(played.validator.iter_errors(json.loads(json.dumps(bad))))


def test_the_prompt_of_a_served_turn_is_that_of_the_demo():
    import jinja2

    parts = [{"type": "audio"}, {"type": "text", "text": "emotion"}]
    prompt = jinja2.Template(TEMPLATE).render(messages=[{"role": "user", "content": parts}])
    assert prompt == small_host.PROMPT.format(task="emotion")


def test_an_answer_is_compared_by_its_tokens():
    expected = torch.tensor([0.5, 0.25, 0.25]).log()
    tops = [{"token": small_host.WORDS[2], "logprob": -1.5}, {"token": " <pad>", "logprob": -0.7}]
    answer = {"choices": [{"logprobs": {"content": [{"top_logprobs": tops}]}}]}
    read = log_probabilities(answer)
    assert read == {2: -1.5, 0: -0.7}
    assert distance(read, expected) == pytest.approx(1.5 - 1.386294, abs=1e-5)


@pytest.mark.parametrize(
    ("executable", "match"), [("no-vllm", "not on the PATH"), ("false", "serve")]
)
def test_a_server_that_does_not_come_up(tmp_path, executable, match):
    with pytest.raises(ArgumentError, match=match), serving(tmp_path, executable):
        pass
