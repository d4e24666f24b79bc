"""The question: what does the next turn cost after n earlier ones, in three ways to remember?

* memory: the host hears the new turn; its adapter reads and writes a state of fixed size;
* concatenation: all earlier turns are in the prompt again, their audio embeddings kept;
* cache: the keys and values of all earlier turns are kept, the host hears the new turn.

All on the decoder of a narrow Qwen2-Audio, from embeddings: without its audio tower, which for
concatenation is generous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import Result
from bench.interleaved import quantiles, timed, wall_clock_ms
from mal_kernels import MALAdapter
from mal_kernels.testing import cache_name
from mal_kernels.testing.hosts.narrow import FIELDS, TEXT, TURN, narrow_host

TURN_TOKENS = TURN + TEXT
NARROWER = dict(zip(FIELDS, (256, 688, 4, 2, 2), strict=True)) | {"max_position_embeddings": 2**18}


def ask(quick: bool, say: Callable[[str], None]) -> Result:
    """Milliseconds and bytes to remember after each of several numbers of earlier turns."""
    every = (0, 1, 3, 10) if quick else (0, 1, 3, 10, 30, 100, 300, 1000)
    longest, cached = (1, 3) if quick else (100, 1000)  # more would take minutes, or all memory
    host = narrow_host("qwen2_audio", **NARROWER)
    with torch.no_grad():
        return {
            "turn_tokens": TURN_TOKENS,
            "audio_tokens": TURN,
            "sizes": NARROWER,
            "concatenation": [_concatenation(host, n, say) for n in every if n <= longest],
            "cache": [_cache(host, n, say) for n in every if n <= cached],
            "memory": _memory(host, every, say),
        }


def _turn(host: Any, turns: int = 1) -> Tensor:
    """Embeddings ``[1, turns · TURN_TOKENS, Dm]``."""
    width = host.config.text_config.hidden_size
    return 0.02 * torch.randn(1, turns * TURN_TOKENS, width)


def cache_bytes(tokens: int) -> int:
    """Keys and values, float32, of every layer."""
    head = NARROWER["hidden_size"] // NARROWER["num_attention_heads"]
    return 2 * 4 * NARROWER["num_hidden_layers"] * NARROWER["num_key_value_heads"] * head * tokens


def _concatenation(host: Any, turns: int, say: Callable[[str], None]) -> Result:
    say(f"concatenation, {turns} earlier turns")
    embeds = _turn(host, turns + 1)

    def call() -> object:
        return host(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)

    rounds = 5 if turns < 30 else 2 if turns < 100 else 1
    ms = timed({"call": call}, seconds=0.5, rounds=rounds)["call"]
    tokens = embeds.shape[1]
    return {"turns": turns, "tokens": tokens, "ms": ms, "bytes": cache_bytes(tokens)}


def _cache(host: Any, turns: int, say: Callable[[str], None]) -> Result:
    """A cache filled with random keys and values: their numbers do not change the time."""
    from transformers import DynamicCache

    say(f"key-value cache, {turns} earlier turns")
    heads, layers = NARROWER["num_key_value_heads"], NARROWER["num_hidden_layers"]
    past, new = turns * TURN_TOKENS, _turn(host)
    cache, name = DynamicCache(config=host.config.text_config), cache_name(host)
    for layer in range(layers if past else 0):
        cache.update(*torch.randn(2, 1, heads, past, 128), layer)

    def call() -> None:
        host(inputs_embeds=new, **{name: cache}, use_cache=True, logits_to_keep=1)
        cache.crop(-TURN_TOKENS)

    ms = timed({"call": call}, seconds=0.5)["call"]
    tokens = past + TURN_TOKENS
    return {"turns": turns, "tokens": TURN_TOKENS, "ms": ms, "bytes": cache_bytes(tokens)}


def _memory(host: Any, every: Sequence[int], say: Callable[[str], None]) -> list[Result]:
    """Every turn of one long dialogue, really played; n stands for the turns around the n-th."""
    mal = MALAdapter().attach(host)
    mask = torch.zeros(1, TURN_TOKENS, dtype=torch.bool)
    mask[:, TEXT // 2 : TEXT // 2 + TURN] = True
    times = []
    with mal.dialogue("bench") as dialogue, mal.audio_mask(mask):
        for n in range(every[-1] + 6):
            if n % 50 == 0:
                say(f"memory, turn {n} of {every[-1]}")
            embeds = _turn(host)
            times.append(
                wall_clock_ms(lambda x=embeds: host(inputs_embeds=x, logits_to_keep=1))  # type: ignore[misc]
            )
        if dialogue.turns != [len(times)]:
            raise AssertionError(f"{dialogue.turns} turns were written, not {len(times)}")
        held = dialogue.state.nbytes
    mal.detach()
    rows = []
    for n in every:
        around = times[max(n - 5, 1) : n + 6]  # the first call of all warms up
        ms = quantiles(around)
        rows.append({"turns": n, "tokens": TURN_TOKENS, "ms": ms, "bytes": held})
    return rows
