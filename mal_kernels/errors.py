"""Every exception and warning the library raises on purpose.

Each message names the argument, what it was, what was expected and what to do about it, and is
raised before any state changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MALError(Exception):
    """Base of all errors raised by ``mal_kernels``."""


class ArgumentError(MALError, ValueError):
    """An argument has the wrong shape, dtype, device, range or value."""


class BackendUnavailable(MALError, RuntimeError):
    """An explicitly requested backend cannot serve this call; the message says what is missing."""


class HostError(MALError, ValueError):
    """The host model, the injection site or the prompt given to the host cannot work with MAL."""


class CheckpointError(MALError, ValueError):
    """A saved adapter or dialogue state is corrupt, foreign, or of another configuration."""


class StoreError(MALError, RuntimeError):
    """A file or store cannot be written or reached, or a dialogue changed while a turn ran."""


class AudioFileError(MALError, ValueError):
    """An audio file cannot be read or holds no samples."""


class MissingPackage(MALError, ImportError):
    """A package is not installed that only some of the library needs; the message says how to."""


class MALWarning(UserWarning):
    """Base of all warnings, each given once an adapter; ``warnings.filterwarnings`` turns them off.

    They go to the logger ``mal_kernels`` as well, where logging is set up.

    Example:
        >>> import warnings
        >>> from mal_kernels import NoDialogueWarning
        >>> warnings.filterwarnings("ignore", category=NoDialogueWarning)
    """


class TrainingWarning(MALWarning):
    """Training leaves the memory, or what writes it, as it was; the message says how not to."""


class NoDialogueWarning(MALWarning):
    """A trained adapter was called outside of any dialogue, so it remembers nothing."""


class DetachedWarning(MALWarning):
    """Another library took the adapter out of the host."""


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """An import that fails within this context raises :class:`MissingPackage` instead.

    Args:
        extra: of ``mal-kernels``, which installs what is missing.
        what: cannot work without it, as the subject of a sentence.

    Example:
        >>> from mal_kernels.errors import needs
        >>> with needs("hf", "a tiny host"):
        ...     import no_such_package
        Traceback (most recent call last):
            ...
        mal_kernels.errors.MissingPackage: a tiny host needs no_such_package, which is not ...
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"{what} needs {error.name}, which is not installed; "
            f"run: pip install 'mal-kernels[{extra}]'"
        ) from error
