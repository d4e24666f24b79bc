"""What the next turn of a conversation costs, after n earlier turns, in three ways to remember.

* memory: the host hears the new turn; its adapter reads and writes a state of fixed size;
* concatenation: all earlier turns are in the prompt again, their audio embeddings kept;
* cache: the keys and values of all earlier turns are kept, the host hears the new turn.

All on the decoder of a narrow Qwen2-Audio, from embeddings: without its audio tower, which for
concatenation is generous. What is too large is computed from formulas, and marked so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.interleaved import in_turns, quantiles, wall_clock_ms
from bench.questions.overhead import TEXT, TURN, narrow_host
from mal_kernels import MALAdapter
from mal_kernels.testing import cache_name

TURN_TOKENS = TURN + TEXT
NARROWER = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2**18,
}
LEARNED_FROM = 2  # turns; below, fixed costs of a call hide what grows


def cost_of_a_turn(
    every: Sequence[int], longest: int, cached: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Milliseconds and bytes to remember, for n in ``every``.

    Args:
        every: numbers of earlier turns, ascending.
        longest: of them, what concatenation is measured up to.
        cached: of them, what the key-value cache is measured up to.
        say: told what is being measured.
    """
    host = narrow_host("qwen2_audio", **NARROWER)
    with torch.no_grad():
        result: dict[str, Any] = {
            "turn_tokens": TURN_TOKENS,
            "audio_tokens": TURN,
            "sizes": NARROWER,
            "concatenation": [_concatenation(host, n, say) for n in every if n <= longest],
            "cache": [_cache(host, n, say) for n in every if n <= cached],
            "memory": _memory(host, every, say),
        }
    for way in ("concatenation", "cache"):
        result[way] += _by_formula(result[way], way, every)
    return result


def _turn(host: Any, turns: int = 1) -> Tensor:
    """Embeddings ``[1, turns · TURN_TOKENS, Dm]``."""
    width = host.config.text_config.hidden_size
    return 0.02 * torch.randn(1, turns * TURN_TOKENS, width)


def cache_bytes(tokens: int) -> int:
    """Keys and values, float32, of every layer."""
    head = NARROWER["hidden_size"] // NARROWER["num_attention_heads"]
    return 2 * 4 * NARROWER["num_hidden_layers"] * NARROWER["num_key_value_heads"] * head * tokens


def _concatenation(host: Any, turns: int, say: Callable[[str], None]) -> dict[str, Any]:
    say(f"concatenation, {turns} earlier turns")
    embeds = _turn(host, turns + 1)

    def call() -> object:
        return host(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)

    rounds = 5 if turns < 30 else 2 if turns < 100 else 1
    ms = in_turns({"call": call}, seconds=0.5, rounds=rounds)["call"]
    tokens = embeds.shape[1]
    return {"turns": turns, "tokens": tokens, "ms": ms, "bytes": cache_bytes(tokens)}


def _cache(host: Any, turns: int, say: Callable[[str], None]) -> dict[str, Any]:
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

    ms = in_turns({"call": call}, seconds=0.5)["call"]
    tokens = past + TURN_TOKENS
    return {"turns": turns, "tokens": TURN_TOKENS, "ms": ms, "bytes": cache_bytes(tokens)}


def _memory(host: Any, every: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
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
        ms = quantiles(around) | {"calls": len(around)}
        rows.append({"turns": n, "tokens": TURN_TOKENS, "ms": ms, "bytes": held})
    return rows


def _by_formula(
    measured: list[dict[str, Any]], way: str, every: Sequence[int]
) -> list[dict[str, Any]]:
    """The rest of ``every``: a turn costs ``a L`` for its products and ``b L²`` for attention.

    With a cache, ``a + b L``. ``L`` is the length of the context; a and b are fitted by least
    squares of the relative error to what was measured from :data:`LEARNED_FROM` turns on.
    """
    rest = [n for n in every if n > measured[-1]["turns"]]
    if not rest:
        return []
    power = 1 if way == "concatenation" else 0

    def terms(turns: int) -> list[float]:
        length = float((turns + 1) * TURN_TOKENS)
        return [length**power, length ** (power + 1)]

    rows = [x for x in measured if x["turns"] >= LEARNED_FROM] or measured
    a, b = _fitted([terms(x["turns"]) for x in rows], [x["ms"]["median"] for x in rows])
    found = []
    for n in rest:
        first, second = terms(n)
        tokens = (n + 1) * TURN_TOKENS
        found.append(
            {
                "turns": n,
                "tokens": tokens if way == "concatenation" else TURN_TOKENS,
                "ms_by_formula": a * first + b * second,
                "bytes": cache_bytes(tokens),
            }
        )
    return found


def _fitted(basis: list[list[float]], ms: list[float]) -> list[float]:
    """The two coefficients, none of them negative, with the least squares of the relative error."""
    scaled = torch.tensor(basis, dtype=torch.float64) / torch.tensor(ms).unsqueeze(1)
    ones = torch.ones(len(ms), 1, dtype=torch.float64)
    both = torch.linalg.lstsq(scaled, ones).solution.flatten().tolist()
    if len(ms) > 1 and min(both) >= 0:
        return both
    alone = [torch.linalg.lstsq(scaled[:, i : i + 1], ones) for i in (0, 1)]
    left = [float((scaled[:, i : i + 1] @ x.solution - ones).norm()) for i, x in enumerate(alone)]
    return [float(x.solution) if left[i] == min(left) else 0.0 for i, x in enumerate(alone)]
