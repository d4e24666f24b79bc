"""A copy is a copy: of a host without its adapter, of an adapter attached to nothing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import MethodType

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mal_kernels.errors import HostError
from mal_kernels.testing import tiny_inputs
from tests.reliability.echo import CONFIG, WIDTH, Echo, echo_adapter, turn_tokens
from tests.support.adapters import attached


def saved_by_torch(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_by_torch]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_has_no_adapter(host, copied):
    mal, x = attached(host), tiny_inputs(host, [[5]])
    twin = copied(host)
    torch.nn.Module.requires_grad_(twin, False)
    for parameter in twin.parameters():
        parameter.zero_()
    out = twin.generate(**x, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    assert not out.logits[0].any()
    assert not twin(**x).logits.any()
    other = copied(mal)
    with pytest.raises(HostError, match="not attached"):
        other.detach()
    other.attach(twin)
    dialogue = mal.dialogue("a")
    dialogue.generate(**x)
    assert dialogue.turns == [1]
    assert other.dialogue("a").turns == [0]


@pytest.mark.parametrize("copied", COPIES)
def test_what_was_remembered_is_copied(copied):
    host, mal = echo_adapter()
    mal.dialogue("a")(inputs_embeds=turn_tokens(0, 0))
    twin = copied(mal)
    twin.dialogues.undo(["a"])
    assert twin.dialogue("a").turns == [0]
    assert mal.dialogue("a").turns == [1]
    twin.attach(copied_host := Echo())
    for adapter in (mal, twin):
        adapter.dialogue("b")(inputs_embeds=turn_tokens(0, 1))
    both = (adapter.dialogue("b").state.tensors() for adapter in (mal, twin))
    assert all(map(torch.equal, *both))
    assert copied_host is not host


def test_an_average_of_adapters_follows_and_holds_no_host():
    host, mal = echo_adapter()
    mal.requires_grad_(True)
    ema = AveragedModel(mal, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    first = mal.memory.to_out.weight.detach().clone()
    for scale in (1, 3):
        with torch.no_grad():
            mal.memory.to_out.weight.copy_(scale * first)
        ema.update_parameters(mal)
    mean = ema.module.memory.to_out.weight
    torch.testing.assert_close(mean, 2 * first)
    mal.dialogue("a")(inputs_embeds=turn_tokens(0, 0))
    assert ema.module.dialogue("a").turns == [0]
    assert not _reaches(ema, host)
    mal.detach()
    ema.module.attach(host)
    ema.module.dialogue("a")(inputs_embeds=turn_tokens(0, 0))
    assert (ema.module.dialogue("a").turns, mal.dialogue("a").turns) == ([1], [1])


def _reaches(start, wanted) -> bool:
    seen, queue = set(), [start]
    while queue:
        x = queue.pop()
        if x is wanted:
            return True
        if id(x) in seen or isinstance(x, type) or type(x).__name__ == "module":
            continue
        seen.add(id(x))
        values = vars(x).values() if hasattr(x, "__dict__") else gc.get_referents(x)
        queue += [y for y in values if not callable(y) or hasattr(y, "__self__")]
    return False


def elsewhere(mal, host, x):
    """A turn in another process."""
    mal.attach(host)
    dialogue = mal.dialogue("a")
    before = dialogue.turns
    dialogue(**x)
    return before, dialogue.turns, [t.numpy() for t in dialogue.state.tensors()]


@pytest.mark.slow
def test_a_process_that_is_spawned_gets_copies(host):
    mal, x = attached(host), tiny_inputs(host, [[5]])
    mal.requires_grad_(False)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        before, after, state = pool.submit(elsewhere, mal, host, x).result()
    assert (before, after) == ([0], [1])
    dialogue = mal.dialogue("a")
    assert dialogue.turns == [0]
    dialogue(**x)
    for here, there in zip(dialogue.state.tensors(), state, strict=True):
        torch.testing.assert_close(here, torch.from_numpy(there))


def test_a_compiled_host_is_looked_through(host):
    compiled = torch.compile(host, backend="eager")
    mal = attached(compiled)
    with mal.dialogue("a") as dialogue:
        for seed in range(2):
            compiled.generate(**tiny_inputs(host, [[4]], seed=seed), max_new_tokens=1)
    assert dialogue.turns == [2]
    mal.detach()
    assert "generate" not in vars(host)


@pytest.mark.filterwarnings("ignore::mal_kernels.errors.DetachedWarning")
def test_a_generate_that_passes_the_hooks_by_is_refused(host):
    mal = attached(host)
    host.forward = MethodType(type(host).forward, host)  # as if another model had been attached
    with pytest.raises(HostError, match=r"ran another model .* torch.compiler.reset"):
        mal.dialogue("a").generate(**tiny_inputs(host, [[4]]), max_new_tokens=1)
    assert mal.dialogue("a").turns == [0]
    host.generate(**tiny_inputs(host, [[]]), max_new_tokens=1)  # has no audio


class Layered(Echo):
    """An echo with layers, one of which can be a site."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, inputs_embeds):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


def test_a_host_that_was_compiled_before_says_so():
    """torch.compile looks for no hooks that came after it."""
    host, x = Layered(), {"inputs_embeds": turn_tokens(0, 0)}
    host.compile(backend="eager")
    with torch.no_grad():
        mal = attached(host)
        mal.dialogue("a")(**x)
        mal.detach()
        mal = attached(host, site=0)
        with pytest.raises(HostError, match=r"compiled and called before attach\(\)"):
            mal.dialogue("b")(**x)
        torch.compiler.reset()
        mal.dialogue("b")(**x)
    assert mal.dialogue("b").turns == [1]
    torch.compiler.reset()


def test_a_second_adapter_is_refused_by_a_host_without_generate():
    host, mal = echo_adapter()
    with pytest.raises(HostError, match="this Echo has an adapter already"):
        type(mal)(CONFIG).attach(host)
    mal.dialogue("a")(inputs_embeds=turn_tokens(0, 0))
    assert mal.dialogue("a").turns == [1]
