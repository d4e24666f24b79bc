"""The questions are those that people ask first and that no benchmark of one op can answer."""

from __future__ import annotations

from collections.abc import Callable

from bench import Result
from bench.questions import conversation, error, memory, overhead, state, thread

# by name: asked with ``quick`` (small sizes, to see that it runs) and whom to tell what is measured
QUESTIONS: dict[str, Callable[[bool, Callable[[str], None]], Result]] = {
    "memory": memory.ask,
    "conversation": conversation.ask,
    "overhead": overhead.ask,
    "error": error.ask,
    "state": state.ask,
    "thread": thread.ask,
}
