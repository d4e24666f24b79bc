"""Which weights wrote a state: :class:`WeightsDigest`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WeightsDigest:
    """A call returns the SHA-256 of weights, in whatever dtype and on whatever device they are.

    It is computed again only when they have changed: a turn costs a look at their versions.

    Args:
        weights: returns them by name.
    """

    def __init__(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self.weights = weights
        self._known: tuple[Any, str | None] = ((), None)

    def __call__(self) -> str | None:
        """The digest, or ``None`` of weights that are not whole in this process."""
        weights = self.weights()
        versions = [_version(x) for x in weights.values()]
        known, digest = self._known
        if versions != known:
            digest = _digest(weights)
            self._known = (versions, digest)
        return digest


def _version(x: Tensor) -> Any:
    if type(x) not in (Tensor, nn.Parameter):
        return id(x)
    return x.data_ptr(), x.dtype, 0 if x.is_inference() else x._version


def _digest(weights: Mapping[str, Tensor]) -> str | None:
    from safetensors.torch import save

    if any(type(x) not in (Tensor, nn.Parameter) for x in weights.values()):  # as of FSDP
        return None
    # the same number is the same weight in any dtype
    plain = {
        name.replace("_orig_mod.", ""): x.detach().to("cpu", torch.float64).contiguous()
        for name, x in weights.items()
    }
    return hashlib.sha256(save(plain)).hexdigest()
