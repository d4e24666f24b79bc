"""How much is stored for a dialogue, beside the key-value cache of published hosts?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from bench import Result
from bench.cases import HOSTS
from mal_kernels import MALAdapter, MALConfig


def ask(quick: bool, say: Callable[[str], None]) -> Result:
    """Bytes with the default four heads, and with heads that are together as wide as the host."""

    def nbytes(hidden: int, heads: int) -> int:
        say(f"{hidden} wide, {heads} heads")
        memory = MALAdapter(MALConfig(hidden_size=hidden, heads=heads)).memory
        assert memory is not None
        return memory.initial_state(1).nbytes

    rows = [
        {
            **asdict(host),
            "memory_bytes": nbytes(host.hidden, heads=4),
            "wide_memory_bytes": nbytes(host.hidden, heads=host.hidden // 64),
        }
        for host in HOSTS
    ]
    return {"rows": rows}
