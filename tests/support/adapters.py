"""A tiny Qwen2-Audio with an adapter, and what tests compare of them."""

from __future__ import annotations

import torch

from mal_kernels import MALAdapter, MALConfig, MemoryState

SITES = ("embeds", 1)
CONFIG = MALConfig(heads=2, head_dim=8)
DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 8},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


def attached(host, site="embeds", *, trained=True, freeze=True, **options) -> MALAdapter:
    torch.manual_seed(1)
    mal = MALAdapter(MALConfig(heads=2, head_dim=8, site=site, **options))
    mal.attach(host, freeze=freeze)
    if trained:
        torch.nn.init.normal_(mal.memory.to_out.weight, std=0.5)
    return mal


def checkpoint(host, **options) -> None:
    """Turns gradient checkpointing on; transformers 5.23 has a new name for it."""
    new = getattr(host, "activation_checkpointing_enable", None)
    (new or host.gradient_checkpointing_enable)(options)


def row_alone(inputs, row: int):
    """Row ``row`` of a batch as a batch of its own, without padding."""
    keep = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row : row + 1, keep]
    starts = [
        int((r[1:] & ~r[:-1]).sum()) for r in (inputs["input_ids"] == 60)
    ]  # a prompt starts with text
    clips = slice(sum(starts[:row]), sum(starts[: row + 1]))
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if starts[row]:
        for name in ("input_features", "feature_attention_mask"):
            one[name] = inputs[name][clips]
    return one


def states_of(mal: MALAdapter) -> dict[tuple[str, str | None], MemoryState]:
    return {
        (name, who): state
        for name in mal.dialogues
        for who, state in mal.dialogues.latest(name).states.items()
    }


def assert_same_states(a, b, **tolerance) -> None:
    assert a.keys() == b.keys()
    for key in a:
        for x, y in zip(a[key].tensors(), b[key].tensors(), strict=True):
            torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


def generate(host, inputs, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": 4, **options}
    out = host.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return [out.sequences, *out.logits]


def assert_identical(a, b) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def everything_on(host) -> dict[str, object]:
    """Hooks, own attributes and flags of every module, and of every parameter."""
    found = {}
    for path, module in host.named_modules():
        for name, value in vars(module).items():
            keys = sorted(map(str, value)) if isinstance(value, dict) else repr(type(value))
            found[path, name] = keys
        found[path, "checkpointing"] = getattr(module, "gradient_checkpointing", None)
    return found | {n: (p.requires_grad, p.data_ptr()) for n, p in host.named_parameters()}
