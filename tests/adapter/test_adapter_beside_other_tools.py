"""The adapter works beside LoRA, compilation, caches and hooks of others."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import StaticCache

from mal_kernels.testing import cache_name, tiny_inputs
from tests.support.adapters import assert_identical, attached, generate


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("how", ["PeftModel before", "PeftModel after", "add_adapter"])
def test_lora_on_the_same_host(host, how):
    peft = pytest.importorskip("peft")
    x = tiny_inputs(host, [[5]])
    torch.manual_seed(4)
    if how == "PeftModel before":
        model = peft.get_peft_model(host, lora())
        expected = generate(model, x)
        mal = attached(model, trained=False, freeze=False)
    elif how == "PeftModel after":
        mal = attached(host, trained=False)
        model = peft.get_peft_model(host, lora())
        with mal.disable_adapter():
            expected = generate(model, x)
    else:
        try:
            host.add_adapter(lora())
        except ValueError as error:  # transformers 5.24 asks for PEFT 0.22, which is not there yet
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(f"transformers {transformers.__version__} takes no such PEFT: {error}")
        model, expected = host, generate(host, x)
        mal = attached(host, trained=False, freeze=False)
    with mal.dialogue("a") as dialogue:
        assert_identical(generate(model, x), expected)
        torch.nn.init.normal_(mal.memory.to_out.weight, std=0.5)
        y = tiny_inputs(host, [[4]], seed=1)
        model(**y, labels=y["input_ids"]).loss.backward()
        assert dialogue.turns == [2]
    with_memory = model(**x).logits
    if how != "add_adapter":
        with model.disable_adapter():
            without_lora = model(**x).logits
        assert not torch.equal(with_memory, without_lora)
        with mal.disable_adapter():
            assert not torch.equal(with_memory, model(**x).logits)
    # both learn
    assert mal.memory.to_out.weight.grad.any()
    learned = [p for n, p in model.named_parameters() if "lora_" in n and p.grad is not None]
    assert any(p.grad.any() for p in learned)
    mal.detach()
    assert_identical(generate(model, x), expected)


def test_hooks_add_no_graph_break_and_no_recompilation_to_decoding(host):
    x = tiny_inputs(host, [[5], [3]])

    def compiled_turn(count: list[int]) -> torch.Tensor:
        """Prefill in eager mode, then one compiled decode step on a static cache."""
        cache = StaticCache(config=host.config.text_config, max_cache_len=32)
        out = host(**x, **{cache_name(host): cache}, use_cache=True)
        length = x["input_ids"].shape[1]
        mask = torch.cat([x["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        return step(
            input_ids=out.logits[:, -1:].argmax(-1),
            attention_mask=mask,
            **{cache_name(host): cache},
            position_ids=mask.sum(1, keepdim=True) - 1,
            cache_position=torch.tensor([length]),
        ).logits

    graphs: list[int] = []

    def backend(module, _inputs):
        graphs.append(1)
        return module.forward

    mal = attached(host)
    with torch.no_grad(), mal.dialogue(["a", "b"]):
        step = torch.compile(host, backend=backend, fullgraph=True)  # a graph break raises
        first = compiled_turn(graphs)
        mal.undo()
        assert len(graphs) == 1
        assert torch.equal(compiled_turn(graphs), first)
        assert mal.last_turn is not None
        assert len(graphs) == 1
        mal.undo()
        step = host
        torch.testing.assert_close(compiled_turn(graphs), first, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
