"""What the base install can do, and what the rest of the library says when its extra is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# packages that no base install has
EXTRAS = ["transformers", "peft", "accelerate", "typer", "rich", "soundfile", "soxr", "redis"]
EXTRAS += ["matplotlib", "triton", "tokenizers", "sklearn", "scipy", "ninja"]

WITHOUT = "import sys; sys.modules.update(dict.fromkeys({}))\n"

NOTHING_ELSE = """
import torch
from torch import nn
from mal_kernels import HostSpec, MALAdapter, MALConfig, NeuralMemory, ops, register_host
from mal_kernels.testing import make_inputs

*args, options = make_inputs()
ops.neural_memory(*args, **options)
y, state = NeuralMemory(16, heads=2, head_dim=8)(torch.randn(1, 5, 16))


class Layer(nn.Linear):
    def forward(self, hidden_states):
        return hidden_states + super().forward(hidden_states).roll(1, 1)  # positions mix


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(16, 16) for _ in range(3))
        self.config = Config()

    def forward(self, inputs_embeds):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


class Config:
    model_type, hidden_size = "plain", 16


register_host(HostSpec("plain", audio_inputs=(), audio_token=None))
host, x = Decoder(), torch.randn(1, 6, 16)
mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(host)
before = host(inputs_embeds=x)
torch.nn.init.ones_(mal.memory.to_out.weight)
mask = torch.tensor([[False, True, True, True, True, False]])
with mal.dialogue("call-17") as dialogue, mal.audio_mask(mask):
    host(inputs_embeds=x)
    assert not torch.equal(host(inputs_embeds=x), before)
assert dialogue.turns == [1]  # the same clip again is not written again
"""

# what is run, the package that is missing, and the extra that has it
REFUSALS = {
    "a tiny host": (
        "from mal_kernels.testing import tiny_host; tiny_host()",
        "transformers",
        "hf",
    ),
    "mal_kernels.integrations.peft": (
        "import mal_kernels.integrations.peft",
        "peft",
        "peft",
    ),
    "RedisStore": (
        "from mal_kernels.store import RedisStore; RedisStore('redis://127.0.0.1')",
        "redis",
        "redis",
    ),
    "turn.wav: reading recordings": (
        "from mal_kernels.demo.audio import load_turn; load_turn('turn.wav')",
        "soundfile",
        "audio",
    ),
    "the mal-kernels command": (
        "from mal_kernels.__main__ import main; main()",
        "typer",
        "cli",
    ),
    "the demo": (
        "sys.argv[1:] = ['demo']; from mal_kernels.__main__ import main; main()",
        "transformers",
        "demo",
    ),
}


def run_without(packages: list[str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(packages) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_base_install_runs_ops_layer_and_adapter():
    done = run_without(EXTRAS, NOTHING_ELSE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", REFUSALS)
def test_a_missing_package_is_one_sentence(what):
    code, package, extra = REFUSALS[what]
    done = run_without([package], code)
    assert done.returncode == 1
    sentence = (
        f"MissingPackage: {what} needs {package}, which is not installed; "
        f"run: pip install 'mal-kernels[{extra}]'"
    )
    assert done.stderr.strip().splitlines()[-1].endswith(sentence)
    if "main()" in code:  # a command shows nothing else
        assert done.stderr.strip() == sentence


def test_other_failures_of_an_import_are_not_hidden():
    code = "from mal_kernels.errors import needs\nwith needs('hf', 'it'): from math import nothing"
    done = run_without([], code)
    assert re.search(r"^ImportError: cannot import name 'nothing'", done.stderr, re.MULTILINE)
