"""The adapter as a method of PEFT, beside PEFT's own methods."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from mal_kernels import MALAdapter
from mal_kernels.errors import ArgumentError
from mal_kernels.testing import tiny_host, tiny_inputs

peft = pytest.importorskip("peft")
from mal_kernels.integrations.peft import MALModel, MALPeftConfig  # noqa: E402

# of peft 0.21 with transformers 5.17, which has the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def host():
    return tiny_host("qwen2_audio")


def config(**options):
    return MALPeftConfig(heads=2, head_dim=8, **options)


def trained(model) -> MALAdapter:
    torch.manual_seed(1)
    torch.nn.init.normal_(model.base_model.mal.memory.to_out.weight, std=0.5)
    return model.base_model.mal


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def test_a_host_in_peft_is_the_host(host):
    names = list(host.state_dict())
    modules = [name for name, _ in host.named_modules()]
    x = tiny_inputs(host, [[5]])
    clean, said = logits(host.requires_grad_(False), x), host.generate(**x, max_new_tokens=3)
    model = peft.get_peft_model(host, config())
    assert isinstance(model.base_model, MALModel)
    assert model.peft_config["default"].hidden_size == 32
    assert list(host.state_dict()) == names
    assert [name for name, _ in host.named_modules()] == modules
    assert torch.equal(logits(model, x), clean)
    assert torch.equal(model.generate(**x, max_new_tokens=3), said)
    mal = trained(model)
    assert not torch.equal(logits(model, x), clean)
    with model.disable_adapter():
        assert torch.equal(logits(model, x), clean)
        with model.disable_adapter():
            pass
    assert not torch.equal(logits(model, x), clean)
    assert not hasattr(host, "peft_config")
    assert model.unload() is host
    assert torch.equal(logits(host, x), clean)
    assert len(mal.dialogues) == 0


def test_without_the_adapter_in_one_thread_is_with_it_in_another(host):
    x = tiny_inputs(host, [[5]])
    clean = logits(host.requires_grad_(False), x)
    model = peft.get_peft_model(host, config())
    mal = trained(model)
    expected = logits(model, x)
    heard = []

    def elsewhere():
        with mal.dialogue("b"):
            heard.append(logits(model, x))

    with mal.dialogue("a"), model.disable_adapter():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(logits(model, x), clean)
    assert torch.equal(heard[0], expected)
    assert [len(mal.dialogues.latest(name).clips) for name in "ab"] == [0, 1]
    assert torch.equal(logits(model, x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_a_host_with_its_own_adapter(host, copied):
    model = peft.get_peft_model(host, config())
    mal, x = trained(model), tiny_inputs(host, [[5]])
    expected, twin = logits(model, x), copied(model)
    with mal.dialogue("a"), twin.base_model.mal.dialogue("a") as dialogue:
        assert torch.equal(logits(twin, x), expected)
        assert dialogue.turns == [1]
    assert len(mal.dialogues) == 0
    torch.nn.init.zeros_(twin.base_model.mal.memory.to_out.weight)
    assert not torch.equal(logits(twin, x), expected)
    assert torch.equal(logits(model, x), expected)


def test_a_generator_may_not_switch_the_adapter_off(host):
    model = peft.get_peft_model(host, config())

    def stream():
        with model.disable_adapter():
            yield

    with pytest.raises(ArgumentError, match=r"generator stream\(\) opens a context"):
        next(stream())
    assert not model.base_model.mal_layer.disable_adapters


# of a host without a name, where huggingface_hub may not ask the network
@pytest.mark.filterwarnings("ignore:Could not find a config file in  -:UserWarning")
@pytest.mark.parametrize("site", ["embeds", 1])
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_saved_and_loaded_by_peft_it_says_the_same(host, site, task, tmp_path):
    model = peft.get_peft_model(host, config(site=site, task_type=task, lr_init=(0.1, 0.2)))
    mal = trained(model)
    turns = [tiny_inputs(host, [[5], [3]], seed=seed) for seed in range(2)]
    with mal.dialogue(["a", "b"]) as dialogue:
        said = [model.generate(**x, max_new_tokens=3) for x in turns]
        expected = logits(model, turns[1])
    assert dialogue.turns == [2, 2]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["site"], saved["heads"]) == ("MAL", site, 2)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}

    again = peft.PeftModel.from_pretrained(tiny_host("qwen2_audio"), str(tmp_path))
    assert not any(p.requires_grad for p in again.parameters())
    for (name, p), q in zip(mal.named_parameters(), again.base_model.mal.parameters(), strict=True):
        assert torch.equal(p, q), name
    with again.base_model.mal.dialogue(["a", "b"]):
        for x, ids in zip(turns, said, strict=True):
            assert torch.equal(again.generate(**x, max_new_tokens=3), ids)
        assert torch.equal(logits(again, turns[1]), expected)
    assert again.peft_config["default"].lr_init == (0.1, 0.2)
    trainable = peft.PeftModel.from_pretrained(
        tiny_host("qwen2_audio"), str(tmp_path), is_trainable=True
    )
    learning = {name for name, p in trainable.named_parameters() if p.requires_grad}
    assert learning
    assert all("mal_adapters.default" in name for name in learning)


@pytest.mark.filterwarnings("ignore:Could not find a config file in  -:UserWarning")
def test_what_peft_saved_in_half_precision_comes_back_as_float32(host, tmp_path):
    model = peft.get_peft_model(host, config())
    mal = trained(model).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_host("qwen2_audio"), str(tmp_path))
    for ours, theirs in zip(mal.parameters(), again.base_model.mal.parameters(), strict=True):
        assert theirs.dtype == torch.float32
        assert torch.equal(ours.float(), theirs)


def test_what_peft_trained_is_an_adapter_without_peft(host, tmp_path):
    model = peft.get_peft_model(host, config())
    x = tiny_inputs(host, [[5]])
    trained(model).save_pretrained(tmp_path)
    expected = logits(model, x)
    other = tiny_host("qwen2_audio")
    MALAdapter.from_pretrained(tmp_path).attach(other)
    assert torch.equal(logits(other, x), expected)


def test_only_the_adapter_learns(host, capsys):
    model = peft.get_peft_model(host, config())
    model.print_trainable_parameters()
    mal = trained(model)
    assert (
        f"trainable params: {sum(p.numel() for p in mal.parameters()):,d}"
        in capsys.readouterr().out
    )
    with mal.dialogue("a"):
        for seed in range(2):
            x = tiny_inputs(host, [[5]], seed=seed)
            loss = model(**x, labels=x["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in mal.parameters())
    assert all(p.grad is None for p in host.parameters())


def test_one_of_several_adapters_is_active(host):
    model = peft.get_peft_model(host, config())
    x = tiny_inputs(host, [[5]])
    first = trained(model)
    expected = logits(model, x)
    model.add_adapter("second", config(site=1))
    assert model.base_model.mal is first
    assert torch.equal(logits(model, x), expected)
    model.set_adapter("second")
    second = trained(model)
    assert second is not first
    assert not torch.equal(logits(model, x), expected)
    assert not any(p.requires_grad for p in first.parameters())
    with pytest.raises(
        ArgumentError, match=r"'second'; pass one that is not active, of \['default'\]"
    ):
        model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, x), expected)
    with model.disable_adapter():
        clean = logits(model, x)
        model.set_adapter("second")
        assert torch.equal(logits(model, x), clean)
        model.set_adapter("default")
        assert torch.equal(logits(model, x), clean)
    assert torch.equal(logits(model, x), expected)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ArgumentError, match=r"'second'; pass one of \['default'\]"):
        model.base_model.set_adapter("second")


def test_lora_below_it(host):
    x = tiny_inputs(host, [[5]])
    lora = peft.get_peft_model(
        host, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    expected = logits(lora, x)
    with pytest.warns(UserWarning, match="for a second time"):
        model = peft.get_peft_model(lora, config())
    assert torch.equal(logits(model, x), expected)
    mal = trained(model)
    with mal.dialogue("a") as dialogue:
        assert not torch.equal(logits(model, x), expected)
    assert dialogue.turns == [1]
    assert type(lora.peft_config["default"]) is peft.LoraConfig
    assert model.unload() is lora
    assert torch.equal(logits(lora, x), expected)


def test_what_cannot_be(host):
    model = peft.get_peft_model(host, config())
    with pytest.raises(ArgumentError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ArgumentError, match=r"low_cpu_mem_usage is True; pass False"):
        peft.get_peft_model(tiny_host("voxtral"), config(), low_cpu_mem_usage=True)
    with pytest.raises(ArgumentError, match=r"heads is 0"):
        MALPeftConfig(heads=0)


def test_the_library_does_not_import_peft():
    code = "import mal_kernels, sys; mal_kernels.MALAdapter(); assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
