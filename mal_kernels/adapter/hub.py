"""Files of an adapter on disk and on the Hugging Face hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import MALConfig
from ..dialogues.files import read_json, read_tensors, write_file, write_tensors
from ..errors import CheckpointError, StoreError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def save(folder: Path, config: MALConfig, weights: Mapping[str, Tensor]) -> None:
    """Writes an adapter and its model card into ``folder``, which is made if it is not there.

    Weights are float32 under the names they have without ``torch.compile``. With them stand the
    fields of the configuration that they belong to, so that half of a save is not taken for one.
    The name of the base model is written if it is that of a repository: a path says how a machine
    is laid out, and any other text could say in the card what its author never did.

    Raises:
        StoreError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot make the folder {folder}: {error}. Pass another.") from error
    config = replace(config, base_model_name_or_path=_repository(config.base_model_name_or_path))
    plain = {name.replace("_orig_mod.", ""): x.detach().float() for name, x in weights.items()}
    write_tensors(folder / WEIGHTS_NAME, "adapter", plain, {"config": _belongs_to(config)})
    write_file(folder / CONFIG_NAME, (json.dumps(config.to_dict(), indent=2) + "\n").encode())
    write_file(folder / "README.md", model_card(config.base_model_name_or_path).encode())


def _repository(name: str | None) -> str | None:
    """``name`` if it is that of a repository of the hub, as far as that can be told here."""
    found = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name or "", re.ASCII)
    return found[0] if found and not Path(found[0]).exists() else None


def _belongs_to(config: MALConfig) -> dict[str, Any]:
    """Returns the part of a configuration that weights were trained with, as JSON has it."""
    fields: dict[str, Any] = json.loads(
        json.dumps({**config.state_signature(), **config.memory_options()})
    )
    return fields


def load(
    model_id: str | Path,
    expected: Callable[[MALConfig], Mapping[str, Tensor]],
    hub_kwargs: Mapping[str, Any],
) -> tuple[MALConfig, dict[str, Tensor]]:
    """Reads what :func:`save` wrote.

    Args:
        model_id: a folder, or the id of a repository.
        expected: returns weights of the shapes and dtypes that a config asks for.
        hub_kwargs: for ``hf_hub_download``.

    Raises:
        CheckpointError: not found, corrupt, or not an adapter of this library.
    """
    config_file, weights_file = (
        find_file(model_id, name, hub_kwargs) for name in (CONFIG_NAME, WEIGHTS_NAME)
    )
    try:
        text = config_file.read_text()
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"cannot read {config_file}: {error}.") from error
    config = MALConfig.from_dict(read_json(text, str(config_file)))
    if config.hidden_size is None:
        raise CheckpointError(f"hidden_size is null in {config_file}; save the adapter again.")
    tensors, header = read_tensors(weights_file, "adapter", lambda header: expected(config))
    ours, theirs = _belongs_to(config), header.get("config")
    if theirs is not None and theirs != ours:  # version 0.1.0 does not tell
        wrong = sorted(x for x in ours if not isinstance(theirs, dict) or ours[x] != theirs.get(x))
        raise CheckpointError(
            f"{config_file} differs from the configuration of the weights beside it in "
            f"{', '.join(wrong)}: a save was interrupted, or the file edited. Save it again."
        )
    return config, tensors


def push(
    save_to: Callable[[str], None],
    repo_id: str,
    private: bool | None,
    token: str | None,
    commit_message: str,
) -> str:
    """Uploads what ``save_to`` writes into a folder, and returns the address of the repository."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_to(folder)
        address = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message
        )
    return str(address)


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
