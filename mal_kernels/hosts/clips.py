"""Runs of audio tokens in a prompt, and hashes by which a clip is known again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Clip(NamedTuple):
    """One run of audio tokens of a row: positions ``start..stop-1`` and a hash of its audio.

    ``fingerprint`` is ``None`` where clips and audio features do not match one to one.
    """

    start: int
    stop: int
    fingerprint: int | None


def runs_of(audio: Tensor, attention: Any) -> tuple[list[tuple[int, int, int]], list[bool]]:
    """Row, start and stop of every run in ``audio`` ``[R, S]``, and whether it may be attended."""
    edges = torch.nn.functional.pad(audio.int(), (1, 1)).diff(dim=1)  # [R, S+1]
    row, start = (edges == 1).nonzero(as_tuple=True)
    stop = (edges == -1).nonzero(as_tuple=True)[1]
    attended = torch.ones_like(row)
    if isinstance(attention, Tensor) and attention.dim() == 2:
        # with a cache the attention mask is longer than what is new
        attended = attention[:, -audio.shape[1] :].to(audio.device)[row, start] != 0
    # one transfer from the device
    table = torch.stack([row, start, stop, attended.to(row.dtype)], 1).tolist()
    return [(r, a, b) for r, a, b, _ in table], [bool(h) for *_, h in table]


def placed(embeds: Tensor, audio: Sequence[Tensor]) -> Tensor:
    """Which positions ``[R, S]`` of ``embeds`` ``[R, S, Dm]`` hold a vector of ``audio``.

    Vectors of each of ``audio``, ``[..., Dm]``, are the same bit for bit in the dtype of
    ``embeds``. Zeros are padding wherever they stand.
    """
    here = _hashes(embeds.flatten(0, 1))  # [R * S]
    rows = [x.to(embeds).flatten(0, -2) for x in audio]
    found = torch.isin(here, torch.cat([_hashes(x) for x in rows])) & (here != 0)
    return found.view(embeds.shape[:2])


def fingerprint(features: Tensor) -> list[int]:
    """A 64-bit hash of each entry of ``features`` ``[N, ...]``.

    Integer arithmetic modulo 2^64: the same on every device, in any order of summation, and only
    ``8 N`` bytes leave the device.
    """
    hashes: list[int] = _hashes(features.flatten(1)).tolist()
    return hashes


def _hashes(rows: Tensor) -> Tensor:
    """Hashes ``[N]`` of ``rows`` ``[N, K]``; 0 for one of zeros."""
    size = rows.element_size()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    words = rows.detach().contiguous().view(integer).long()
    # odd pseudo-random factors: a change of any single word changes the hash
    factor = torch.arange(1, words.shape[1] + 1, device=words.device) * -0x61C8864680B583EB
    factor = (factor ^ (factor >> 29)) * -0x40A7B892E31B1A47 | 1
    return (words * factor).sum(1)
