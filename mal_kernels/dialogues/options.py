"""The options of a store are checked where they are set, by :func:`check_option`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "undo_depth": (lambda x: type(x) is int and x >= 0, "a whole number, 0 for no undo"),
    "max_dialogues": (_is_count, "a whole number, or None for no bound"),
    "max_bytes": (_is_count, "a whole number, or None for no bound"),
    "cache_seconds": (lambda x: type(x) in (int, float) and 0 < x <= 1800, "seconds up to 1800"),
}


def check_option(name: str, value: Any) -> None:
    """Nothing happens if ``value`` is one for the option ``name``, or that is no option.

    Raises:
        ArgumentError: it is not.
    """
    if name in _OPTIONS and not _OPTIONS[name][0](value):
        raise ArgumentError(f"dialogues.{name} is {value!r}; pass {_OPTIONS[name][1]}.")
