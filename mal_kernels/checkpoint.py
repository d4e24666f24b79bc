"""Saved files: safetensors that say what they are, read without trust in what they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CheckpointError

VERSION = 1  # of the header


def write_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Writes ``tensors`` and a JSON ``header`` to ``path``, which appears whole or not at all."""
    from safetensors.torch import save

    path = Path(path)
    about = json.dumps({"kind": kind, "version": VERSION, **header})
    blob = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"mal_kernels": about},  # a second key would make the order of bytes random
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(blob)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and header of a file that :func:`write_tensors` wrote for ``kind``.

    Raises:
        CheckpointError: no such file, truncated, not safetensors, or written for something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path} as safetensors ({error}); expected a file written by mal_kernels. "
            "Copy it again, it may be truncated."
        ) from error
    header = read_json(metadata.get("mal_kernels", "null"), f"the header of {path}")
    if (header.pop("kind", None), header.pop("version", None)) != (kind, VERSION):
        raise CheckpointError(
            f"{path} is a safetensors file, but not {kind!r} of version {VERSION} written by "
            "mal_kernels; pass the file that was saved for this purpose."
        )
    return tensors, header


def read_json(text: str, what: str) -> dict[str, Any]:
    """The JSON object in ``text``; ``what`` names it in the error.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{what} is not JSON: {error}. Save it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{what} is a JSON {type(value).__name__}; expected an object written by mal_kernels."
        )
    return value


def check_tensors(
    path: str | Path, found: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> None:
    """Compares names, shapes, dtypes and finiteness with what the configuration asks for.

    Raises:
        CheckpointError: names every difference.
    """
    wrong = [f"{name} is missing" for name in sorted(like.keys() - found.keys())]
    wrong += [f"{name} is not expected" for name in sorted(found.keys() - like.keys())]
    for name in sorted(like.keys() & found.keys()):
        have, want = found[name], like[name]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            wrong.append(f"{name} is {_describe(have)}, expected {_describe(want)}")
        elif have.is_floating_point() and not have.isfinite().all():
            wrong.append(f"{name} has values that are not finite")
    if wrong:
        raise CheckpointError(
            f"{path} does not fit this configuration: {'; '.join(wrong)}. "
            "Load it with the configuration it was saved with."
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def find_file(model_id: str | Path, name: str, hub_kwargs: Mapping[str, Any]) -> Path:
    """``name`` in the folder ``model_id``, or downloaded from that repository of the hub.

    Raises:
        CheckpointError: neither exists, or the hub cannot be reached.
    """
    if Path(model_id).is_dir():
        return Path(model_id) / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(model_id), name, **hub_kwargs))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"model_id {str(model_id)!r} is not a folder, and not a repository with {name} that "
            f"can be reached: {error}"
        ) from error


def model_card(base_model: str | None) -> str:
    """README of a saved adapter, in the format of the hub."""
    relation = f"base_model: {base_model}\nbase_model_relation: adapter\n" if base_model else ""
    return f"""---
library_name: mal_kernels
{relation}tags:
- neural-memory
- audio
---

# Memory-as-a-Layer adapter{f" for {base_model}" if base_model else ""}

```python
from mal_kernels import MALAdapter

mal = MALAdapter.from_pretrained("this/repository").attach(model)
with mal.dialogue("call-17"):
    model.generate(**processor(...))
```
"""
