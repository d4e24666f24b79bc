"""An adapter that is saved and loaded is the same adapter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from mal_kernels import MALAdapter, MALConfig
from mal_kernels.errors import ArgumentError, CheckpointError
from mal_kernels.testing import tiny_inputs
from tests.support.adapters import CONFIG, attached


def test_save_and_load(host, tmp_path):
    mal = attached(host, 1, lr_init=(0.1, 0.2))
    x = tiny_inputs(host, [[5, 3]])
    expected = host(**x).logits
    mal.save_pretrained(tmp_path / "mal")
    mal.detach()
    files = {path.name for path in (tmp_path / "mal").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    loaded = MALAdapter.from_pretrained(tmp_path / "mal")
    assert loaded.config == mal.config
    assert loaded.config.lr_init == (0.1, 0.2)
    loaded.attach(host)
    assert torch.equal(host(**x).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.detach()
    trainable = MALAdapter.from_pretrained(str(tmp_path / "mal"), is_trainable=True)
    assert all(p.requires_grad for p in trainable.parameters())


def test_saving_needs_weights(tmp_path):
    with pytest.raises(ArgumentError, match=r"hidden_size is None.*attach"):
        MALAdapter(CONFIG).save_pretrained(tmp_path / "mal")
    assert not (tmp_path / "mal").exists()


def test_model_card_names_the_base_model(host, tmp_path):
    host.config._name_or_path = "some/host"
    MALAdapter(CONFIG).attach(host).save_pretrained(tmp_path)
    card = pytest.importorskip("huggingface_hub").ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mal_kernels"
    assert card.data.base_model == "some/host"
    assert card.data.base_model_relation == "adapter"


@pytest.mark.parametrize(
    "name",
    ["/data/me/host", "../host", "folder", "host\nlicense: mit", "<b>host</b>", "a/b/c", "host "],
)
def test_only_the_name_of_a_repository_is_saved(name, host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    host.config._name_or_path = name
    mal = MALAdapter(CONFIG).attach(host)
    mal.save_pretrained("saved")
    assert mal.config.base_model_name_or_path == name
    assert MALAdapter.from_pretrained("saved").config.base_model_name_or_path is None
    card = (tmp_path / "saved/README.md").read_text()
    assert "base_model" not in card
    assert name.strip() not in card.replace("this/repository", "")


def test_what_is_pushed_to_the_hub_can_be_loaded_from_it(host, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    done = {}

    class Api:
        def __init__(self, token):
            done["token"] = token

        def create_repo(self, repo_id, **options):
            done["repo"] = repo_id, options

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name, **_: tmp_path / repo / name)
    mal = attached(host)
    assert mal.push_to_hub("me/mal", private=True, token="t") == "https://hub/me/mal"
    assert done == {"token": "t", "repo": ("me/mal", {"private": True, "exist_ok": True})}
    files = sorted(path.name for path in (tmp_path / "me" / "mal").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    x = tiny_inputs(host, [[5]])
    expected = host(**x).logits
    mal.detach()
    MALAdapter.from_pretrained("me/mal").attach(host)
    assert torch.equal(host(**x).logits, expected)


def test_print_trainable_parameters(host, capsys):
    mal = MALAdapter(CONFIG)
    mal.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 0 || all params: 0")
    mal.attach(host).print_trainable_parameters()
    mine = sum(p.numel() for p in mal.parameters())
    every = mine + sum(p.numel() for p in host.parameters())
    assert capsys.readouterr().out.split(" || ")[:2] == [
        f"trainable params: {mine:,d}",
        f"all params: {every:,d}",
    ]


@pytest.fixture
def folder(tmp_path):
    MALAdapter(MALConfig(heads=2, head_dim=8, hidden_size=32)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "is a JSON list; expected an object"),
        ("{", "is not JSON"),
        ('{"peft_type": "LORA", "r": 8}', r"written by .*None.*library that wrote it"),
        ({"version": 2}, r"\('mal_kernels', 2\)"),
        ({"rank": 8, "alpha": 1}, r"unknown keys \['alpha', 'rank'\]"),
        ({"heads": "two"}, r"not valid: MALConfig.heads is 'two'"),
        ({"hidden_size": None}, r"hidden_size is null"),
        ({"heads": 4}, r"memory.to_rates.bias is float32 \[6\], expected float32 \[12\]"),
        ({"residual_norm": True}, r"memory.init.2 is missing"),
    ],
)
def test_bad_adapter_config(folder, text, match):
    path = folder / "adapter_config.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=match):
        MALAdapter.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 50, -4])
def test_truncated_adapter(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cannot read .*adapter_model.safetensors"):
        MALAdapter.from_pretrained(folder)


def test_foreign_or_missing_adapters(folder, tmp_path):
    mal = MALAdapter.from_pretrained(folder)
    mal.dialogues.save(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not 'adapter' written by"):
        MALAdapter.from_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*adapter_config.json"):
        MALAdapter.from_pretrained(folder)
    for missing in ("nobody/nothing", "not//a repository", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="is not a folder, and not a repository"):
            MALAdapter.from_pretrained(missing)


RESUME = """
import sys
from mal_kernels import MALAdapter
from mal_kernels.testing import tiny_host, tiny_inputs

folder = sys.argv[1]
host = tiny_host("qwen2_audio")
mal = MALAdapter.from_pretrained(folder).attach(host)
mal.dialogues.load(folder + "/calls.safetensors")
with mal.dialogue(["a", "b"], ["A", None]):
    ids = host.generate(**tiny_inputs(host, [[5], [3]], seed=2), max_new_tokens=4)
mal.dialogues.save(folder + "/resumed.safetensors")
print(ids.tolist())
"""


def test_interrupted_and_resumed_is_uninterrupted(host, tmp_path):
    mal = attached(host, site=1)
    turns = [tiny_inputs(host, [[5], [3]], seed=i) for i in range(3)]
    with mal.dialogue(["a", "b"], ["A", None]):
        for x in turns[:2]:
            host.generate(**x, max_new_tokens=2)
        mal.save_pretrained(tmp_path)
        mal.dialogues.save(tmp_path / "calls.safetensors")
        ids = host.generate(**turns[2], max_new_tokens=4)
    mal.dialogues.save(tmp_path / "uninterrupted.safetensors")
    mal.detach()
    command = [sys.executable, "-c", RESUME, str(tmp_path)]
    # another number of threads adds in another order
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    resumed = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    assert json.loads(resumed.splitlines()[-1]) == ids.tolist()
    whole, parts = (
        (tmp_path / f"{name}.safetensors").read_bytes() for name in ("uninterrupted", "resumed")
    )
    assert whole == parts
