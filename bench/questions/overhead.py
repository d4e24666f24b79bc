"""The question: what does the memory add to my model? Narrow hosts, with and without it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench import Result
from bench.interleaved import in_pairs, quantiles
from mal_kernels import MALAdapter
from mal_kernels.testing import cache_name
from mal_kernels.testing.hosts.narrow import FIELDS, TURN, narrow_host, narrow_inputs

TITLES = {
    "qwen2_audio": "Qwen2-Audio",
    "audioflamingo3": "Audio Flamingo 3",
    "qwen2_5_omni_thinker": "Qwen2.5-Omni",
}


def ask(quick: bool, say: Callable[[str], None]) -> Result:
    """Measures what the memory adds to each narrow host."""
    found = {}
    for name, title in TITLES.items():
        say(title)
        found[title] = added(name, *((2, 2) if quick else (12, 150)))
    return found


def added(name: str, prefills: int, decodes: int) -> Result:
    """Measures what an attached memory adds to a turn's first call and to every token after it.

    Two hosts with the same weights, one of them with an adapter and an open dialogue, side by side.
    The audio tower is timed apart: its share depends on its size, not on the memory.
    """
    host = narrow_host(name)
    other = copy.deepcopy(host)
    mal = MALAdapter().attach(other)
    # two clips in turns: one that repeats the last turn would not be written
    prompts = [narrow_inputs(name, seed) for seed in (0, 1)]
    calls = {"host": 0, "memory": 0}

    def prefill(who: str, model: Any) -> Any:
        calls[who] += 1
        return model(**prompts[calls[who] % 2], use_cache=True, logits_to_keep=1)

    with torch.no_grad(), mal.dialogue("bench"), _tower_ms(host) as encoding:
        first = in_pairs(
            lambda: prefill("host", host), lambda: prefill("memory", other), rounds=prefills
        )
        encode = quantiles(encoding)
        if mal.last_turn is None or mal.last_turn.tokens != [TURN]:
            raise AssertionError(f"{name}: the turn was not heard")
        alone, remembering = (_decode(name, model, prompts[0]) for model in (host, other))
        after = in_pairs(alone, remembering, rounds=decodes)
    decoder_ms = first["base"]["median"] - encode["median"]
    return {
        "sizes": {name: getattr(host.config.text_config, name) for name in FIELDS},
        "prefill": first,
        "tower": encode,
        "decode": after,
        "share_of_call": first["added"]["median"] / first["base"]["median"],
        "share_of_prefill": first["added"]["median"] / decoder_ms,
        "share_of_decode": after["added"]["median"] / after["base"]["median"],
    }


@contextmanager
def _tower_ms(host: Any) -> Iterator[list[float]]:
    """Milliseconds of every call of the audio tower."""
    (tower,) = (m for name, m in host.named_modules() if name.split(".")[-1] == "audio_tower")
    starts, ms = [0.0], list[float]()

    def begin(*_: object) -> None:
        starts[0] = time.perf_counter()

    def end(*_: object) -> None:
        ms.append(1e3 * (time.perf_counter() - starts[0]))

    handles = tower.register_forward_pre_hook(begin), tower.register_forward_hook(end)
    yield ms
    for handle in handles:
        handle.remove()


def _decode(name: str, model: Any, prompt: dict[str, Tensor]) -> Callable[[], None]:
    """One more token after ``prompt``; the cache is as long before each call."""
    cache = getattr(model(**prompt, use_cache=True), cache_name(model))
    length = prompt["input_ids"].shape[1]
    arguments = {
        "input_ids": prompt["input_ids"][:, -1:],
        "attention_mask": torch.ones(1, length + 1, dtype=torch.long),
    }
    if name == "qwen2_5_omni_thinker":  # where generate would put it: time, height, width
        arguments["position_ids"] = torch.full((3, 1, 1), length)

    def step() -> None:
        model(**arguments, **{cache_name(model): cache}, use_cache=True)
        cache.crop(-1)

    return step
