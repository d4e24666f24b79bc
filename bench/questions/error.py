"""Does it drift over a long stream?

Relative RMS error of the output, in stretches of the stream that double in length, against the
token-by-token recurrence in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench import Result
from bench.cases import Case
from bench.providers import THEIRS
from mal_kernels import MemoryState, ops, reference


def ask(quick: bool, say: Callable[[str], None]) -> Result:
    """One curve for each dtype and implementation."""
    tokens = 256 if quick else 4096
    case = Case("error", heads=1, tokens=tokens, head_dim=32, hidden_dim=64)
    *inputs, w1, w2, s1, s2 = (x.detach() for x in case.leaves("token"))
    # a hundredth of the decay, which pulls toward zero: a deep memory would be dead by T = 2048
    inputs[5] = inputs[5] / 100
    state = MemoryState((w1, w2), (s1, s2))

    def run(function: Callable[..., Any], token_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
        cast = [x.to(token_dtype if i < 3 else dtype) for i, x in enumerate(inputs)]
        out = function(*cast, state.map(lambda x: x.to(dtype)), chunk_size=case.chunk_size)
        return out.output.detach().double()

    say("the recurrence in float64")
    golden = run(reference.recurrence, torch.float64, torch.float64)
    edges = [0, *(2**i for i in range(6, tokens.bit_length()))]

    def errors(found: Tensor) -> list[float]:
        pieces = [
            (found[:, a:b], golden[:, a:b]) for a, b in pairwise(edges) if b <= found.shape[1]
        ]
        return [float((x - y).norm() / y.norm()) for x, y in pieces]

    say("float32 and bfloat16")
    single, low = torch.float32, torch.bfloat16
    curves = {
        "mal_kernels, float32": errors(run(ops.neural_memory, single, single)),
        "mal_kernels, bfloat16 tokens": errors(run(ops.neural_memory, low, single)),
        "token by token, float32": errors(run(reference.recurrence, single, single)),
    }
    say("titans-pytorch")
    short = replace(case, tokens=min(tokens, 1024))
    with torch.no_grad():
        found = THEIRS.build(short)(*(x[:, : short.tokens] for x in inputs), state)[0]
    curves["titans-pytorch, float32"] = errors(found.double())
    return {"case": asdict(case), "until": edges[1:], "relative_rms": curves}
