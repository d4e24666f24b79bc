"""What a turn sends, as read by the vLLM that is installed: its request classes and its parser.

The CI has none. A wheel for CUDA also serves without a GPU: ``VLLM_TARGET_DEVICE=cpu``.
"""

from __future__ import annotations

import json

import pytest
import torch

from examples.serve_vllm import embeds_part
from tests.reliability.load import SCHEMA, chat_request, recordings, small_sidecar
from tests.reliability.served import chat_schema, save_model

vllm, arguments, protocol, exceptions, chat = (
    pytest.importorskip(name, reason="no vLLM: pip install vllm")
    for name in (
        "vllm",
        "vllm.engine.arg_utils",
        "vllm.entrypoints.openai.chat_completion.protocol",
        "vllm.exceptions",
        "vllm.renderers.chat_utils",
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


def config(folder, **options):
    return arguments.EngineArgs(
        model=str(folder), max_model_len=64, **options
    ).create_model_config()


def test_every_field_of_a_turn_is_one_that_vllm_knows():
    sidecar, sent = small_sidecar("http://127.0.0.1:1", None), []
    sidecar.vllm.post = lambda request: sent.append(request)
    for turn, wav in enumerate(recordings(1, 3)[0]):
        sidecar.chat(chat_request(0, turn, wav))
    for request in sent:
        parsed = protocol.ChatCompletionRequest.model_validate(json.loads(json.dumps(request)))
        assert parsed.model_extra == {}
        assert parsed.messages[0]["content"][0] == request["messages"][0]["content"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_embeddings_arrive_bit_for_bit_and_are_cached_by_our_uuid(folder, dtype):
    embeds = torch.randn(7, 64, dtype=dtype)
    part = embeds_part(embeds, "call-17\0" + "3")
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "emotion"}]}]
    request = protocol.ChatCompletionRequest.model_validate({"messages": messages})
    _, data, uuids = chat.parse_chat_messages(
        request.messages, config(folder, enable_mm_embeds=True), content_format="openai"
    )
    assert torch.equal(data["audio"][0], embeds)
    assert uuids == {"audio": [part["uuid"]]}
    with pytest.raises(exceptions.VLLMValidationError, match="--enable-mm-embeds"):
        chat.parse_chat_messages(request.messages, config(folder), content_format="openai")


def test_the_recorded_schema_is_that_of_its_classes():
    recorded = json.loads(SCHEMA.read_text())
    if vllm.__version__ not in recorded["description"]:
        pytest.skip(f"vLLM {vllm.__version__}, but {recorded['description']}")
    assert chat_schema() == recorded
