"""Files of an adapter on disk and on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


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
