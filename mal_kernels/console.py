"""Commands of this package share how they speak: errors that a person can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from .errors import MALError


@contextmanager
def errors_without_traceback() -> Iterator[None]:
    """Turns what the library refuses into its message and exit code 1."""
    try:
        yield
    except MALError as error:
        message = Text.assemble((type(error).__name__, "red"), f": {error}")
        Console(stderr=True).print(message, soft_wrap=True)
        raise typer.Exit(1) from error
