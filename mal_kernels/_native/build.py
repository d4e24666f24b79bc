"""Sources of a library, and the user's cache of what was compiled from them.

Standard library only, and so are the modules of backends that import it: ``setup.py`` uses them
where torch is absent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class BuildError(Exception):
    """The library cannot be built; the message says why and what to do."""


def source_folder() -> Path:
    """``csrc/``, in an installed package or in a clone."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the sources are missing: no csrc in {package} or {package.parent}")


def content_hash(files: Iterable[Path], *settings: object) -> str:
    """Hashes what decides what a library does: its sources and the ``settings`` of the build."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mal_kernels``, by default below ``~/.cache``; made if it isn't there.

    What lies there is run, so the folder must be the user's own and for nobody else to write to.

    Raises:
        BuildError: it cannot be made, or others could have put something there.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "mal_kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise BuildError(f"{folder} cannot be made: {error}; set XDG_CACHE_HOME") from error
    if found.st_uid != os.geteuid():
        raise BuildError(
            f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of yours"
        )
    if found.st_mode & 0o022:
        raise BuildError(f"others can write to {folder}, from where code is run: chmod go-w it")
    return folder


def found_or_built(find: Callable[[], Path | None], build: Callable[[], Path], lock: str) -> Path:
    """Returns what ``find`` finds, else what ``build`` makes.

    Of several processes that want it at once, one builds and the others wait: ``lock`` is the name
    of a file in the cache.
    """
    if found := find():
        return found
    with _locked(cache_folder() / lock):
        return find() or build()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file; the system lets go of it when a process dies."""
    import fcntl  # not on Windows, where a library is refused before

    with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
