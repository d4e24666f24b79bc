"""Saved files: safetensors that say what they are, read without trust in what they hold.

The header is a JSON object under the key ``mal_kernels`` of the safetensors metadata. Its
``checksum`` is the SHA-256 of all bytes of the file, with 64 zeros in its own place.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ..errors import ArgumentError, CheckpointError, StoreError
from .locks import lock_file, open_folder

VERSION = 2  # of the header; files of version 1 have no checksum
UNSIGNED = "0" * 64
MAX_HEADER = 100_000_000  # bytes; safetensors itself reads no longer ones
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


# --- writing --------------------------------------------------------------------------------------


def pack(kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """``tensors`` and a JSON ``header`` as the bytes of a safetensors file; equal ones as equal."""
    from safetensors.torch import save

    # checksum first: no string of the caller can come before it
    about = {"checksum": UNSIGNED, "kind": kind, "version": VERSION, **header}
    text = json.dumps(about)
    if 2 * len(text) > MAX_HEADER:  # it is escaped once more
        raise ArgumentError(
            f"the ids and clips of {kind} take {len(text):,} characters, more than can be read "
            "again; pass shorter ids, or save in parts."
        )
    blob = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"mal_kernels": text},  # a second key would make the order random
    )
    checksum = hashlib.sha256(blob).hexdigest()
    return blob.replace(UNSIGNED.encode(), checksum.encode(), 1)


def write_file(path: str | Path, blob: bytes, mode: int = 0o666) -> None:
    """Writes ``path``, which appears whole or not at all, and is on the disk on return.

    Args:
        path: replaced if it exists.
        blob: its new content.
        mode: its permissions, less the process's umask.

    Raises:
        StoreError: it cannot be written; what was there is still there.
    """
    path = Path(path)
    try:
        partial = PartialFile(path, mode)
        try:
            partial.write(blob)
            partial.rename()
        finally:
            partial.discard()
        sync_folder(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise StoreError(
            f"cannot write {path}: {error}. Make room, or pass another path."
        ) from error


class PartialFile:
    """A file beside ``path``, ``.name.random``, that is to take its place.

    It is locked while its process is alive: one that is not was left over by a kill.

    Args:
        path: what it will replace.
        mode: permissions, less the process's umask.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.target = path
        while True:
            self.path = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            # "x" follows no link; no interrupt comes between the descriptor and its owner
            self.file: BinaryIO = open(  # noqa: SIM115
                self.path, "xb", opener=partial(os.open, mode=mode)
            )
            lock_file(self.file.fileno())
            if os.name != "posix" or os.fstat(self.file.fileno()).st_nlink:
                return  # else it was taken for left over before it was locked

    def write(self, blob: bytes) -> None:
        """Puts all of ``blob`` on the disk."""
        self.file.write(blob)
        self.file.flush()
        os.fsync(self.file.fileno())

    def rename(self) -> None:
        """The content becomes that of the target, in one step."""
        self.path.replace(self.target)

    def discard(self) -> None:
        """Closes the file, and removes it if it was not renamed."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Opens the lock; what could not be written is dropped without another error."""
        with suppress(OSError):
            self.file.close()


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` outlive a loss of power, where the system can."""
    if os.name == "posix":
        with open_folder(folder) as descriptor:
            os.fsync(descriptor)


def write_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """:func:`pack` to a file, which appears whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    write_file(path, pack(kind, tensors, header))


# --- reading --------------------------------------------------------------------------------------


def read_tensors(
    source: str | Path | bytes,
    kind: str,
    expected: Callable[[dict[str, Any]], Mapping[str, Tensor]] | None = None,
    name: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and header of what :func:`pack` made for ``kind``.

    Nothing is allocated for a tensor before the header is known to be right.

    Args:
        source: a path, or the bytes themselves.
        kind: what the file is for.
        expected: given the header, tensors of the names, shapes and dtypes that must be there; on
            any device, ``meta`` too, and their values must be finite. ``None``: any tensors.
        name: of the source, for errors; the path if ``None``.

    Raises:
        CheckpointError: no such file, truncated, changed, not safetensors, written for something
            else or by a newer version, or not the tensors that were expected.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), len(source), name or "bytes", kind, expected)
    path, name = Path(source), name or str(source)
    try:
        if not path.is_file():
            raise _unreadable(name, "no such file")
        with path.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size, name, kind, expected)
    except OSError as error:
        raise _unreadable(name, error) from error


def _read(
    file: BinaryIO,
    size: int,
    name: str,
    kind: str,
    expected: Callable[[dict[str, Any]], Mapping[str, Tensor]] | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    table, start = _read_table(file, size, name)
    header = _about(table, name)
    _check_kind(header, name, kind)
    like = None if expected is None else expected(header)
    if like is not None:
        _compare(name, {key: _entry(x) for key, x in table.items() if key != "__metadata__"}, like)
        if start + sum(x.nbytes for x in like.values()) != size:
            raise _unreadable(name, f"its length of {size} bytes is not that of its tensors")
    file.seek(0)
    blob = file.read()
    if not _is_intact(blob, start, header):
        raise CheckpointError(
            f"the checksum of {name} does not match: it was changed or damaged after it was "
            "written. Use another copy of it."
        )
    try:
        tensors = load(blob)
    except SafetensorError as error:
        raise _unreadable(name, error) from error
    if like is not None:
        _compare(name, {key: _describe(x) for key, x in tensors.items()}, like)
        _check_finite(name, tensors)
    return tensors, header


def _read_table(file: BinaryIO, size: int, name: str) -> tuple[dict[str, Any], int]:
    """The table of contents of a safetensors file, and where the first tensor begins."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, MAX_HEADER):
        raise _unreadable(name, f"a header of {length} bytes cannot be in {size}")
    try:
        text = file.read(length).decode()
    except UnicodeDecodeError as error:
        raise _unreadable(name, error) from error
    return read_json(text, f"cannot read {name} as safetensors: its header"), 8 + length


def _about(table: dict[str, Any], name: str) -> dict[str, Any]:
    metadata = table.get("__metadata__")
    text = metadata.get("mal_kernels") if isinstance(metadata, dict) else None
    return read_json(text if isinstance(text, str) else "null", f"the header of {name}")


def _check_kind(header: dict[str, Any], name: str, kind: str) -> None:
    version = header.get("version")
    if header.get("kind") != kind or type(version) is not int or version < 1:
        raise CheckpointError(
            f"{name} is a safetensors file, but not {kind!r} written by mal_kernels; pass the file "
            "that was saved for this purpose."
        )
    if version > VERSION:
        raise CheckpointError(
            f"{name} was written by a newer mal_kernels (format {version}; this one reads up to "
            f"{VERSION}). Upgrade mal_kernels."
        )


def _is_intact(blob: bytes, start: int, header: dict[str, Any]) -> bool:
    checksum = header.get("checksum")
    if checksum is None:
        return header["version"] == 1
    if not isinstance(checksum, str) or len(checksum) != len(UNSIGNED) or not checksum.isascii():
        return False
    digest = hashlib.sha256(blob[:start].replace(checksum.encode(), UNSIGNED.encode(), 1))
    digest.update(memoryview(blob)[start:])
    return digest.hexdigest() == checksum


def read_json(text: str, what: str) -> dict[str, Any]:
    """The JSON object in ``text``; ``what`` names it in the error.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}. Save it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{what} is a JSON {type(value).__name__}; expected an object written by mal_kernels."
        )
    return value


def _check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [key for key in sorted(tensors) if not tensors[key].isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{name} does not fit this configuration: {', '.join(bad[:9])} has values that are not "
            "finite. Use another copy of it."
        )


def _compare(name: str, found: Mapping[str, str], like: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError naming every difference from ``like``; ``found`` is described."""
    wanted = {key: _describe(x) for key, x in like.items()}
    wrong = [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
    wrong += [f"{key} is not expected" for key in sorted(found.keys() - wanted.keys())]
    wrong += [
        f"{key} is {found[key]}, expected {wanted[key]}"
        for key in sorted(wanted.keys() & found.keys())
        if found[key] != wanted[key]
    ]
    if wrong:
        more = f"; and {len(wrong) - 9} more" if len(wrong) > 9 else ""
        raise CheckpointError(
            f"{name} does not fit this configuration: {'; '.join(wrong[:9])}{more}. "
            "Load it with the configuration it was saved with."
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _entry(entry: Any) -> str:
    """Says what the table of contents has of a tensor, in the words of :func:`_describe`."""
    if not isinstance(entry, dict):
        return repr(entry)[:80]
    dtype = str(entry.get("dtype"))
    return f"{DTYPES.get(dtype, dtype)} {entry.get('shape')}"[:80]


def _unreadable(name: str, why: object) -> CheckpointError:
    return CheckpointError(
        f"cannot read {name} as safetensors ({why}); expected a file written by mal_kernels. Copy "
        "it again, it may be truncated."
    )
