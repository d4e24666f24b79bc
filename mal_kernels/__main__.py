"""The ``mal-kernels`` command, also as ``python -m mal_kernels``; it needs the extra ``cli``."""

from __future__ import annotations

import sys

from .errors import MissingPackage, needs


def main() -> None:
    """Runs the command, or says in one sentence what it needs and exits with code 1."""
    try:
        with needs("cli", "the mal-kernels command"):
            from .cli import app
    except MissingPackage as error:
        sys.exit(f"MissingPackage: {error}")
    app()


if __name__ == "__main__":
    main()
