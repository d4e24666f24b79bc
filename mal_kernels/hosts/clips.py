"""Runs of audio tokens in a prompt, and hashes by which a clip is known again.

A fingerprint is made of the frames that a mask shows and of nothing else: each frame is compressed
on its device to 64 bits, by NH (the hash of UMAC, RFC 4418) with 32-bit words; those of a clip go
to the CPU and into a keyed BLAKE2b. So padding, the width of the batch and other clips have no part
in it, and a device sends 8 bytes per frame. Who does not have the key cannot make a clip with the
fingerprint of another: one attempt succeeds with a probability of 2^-32. Where a process has the
native CPU kernels, they compute the same numbers in an eighth of the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# samples of a wave are hashed by so many
SAMPLES = 256
# frames at the end of a spectrogram that may have seen the padding behind it, and its least length
EDGE, LONG = 2, 50


class Clip(NamedTuple):
    """One run of audio tokens of a row: positions ``start..stop-1`` and a hash of its audio.

    ``fingerprint`` is ``None`` where it is not known which audio features belong to the clip.
    """

    start: int
    stop: int
    fingerprint: int | None

    def same(self, other: Clip) -> bool:
        """Whether both are known to be the same audio at the same place."""
        return self == other and self.fingerprint is not None


def runs_of(audio: Tensor, attention: Any) -> tuple[list[tuple[int, int, int]], list[bool]]:
    """Row, start and stop of every run in ``audio`` ``[R, S]``, and whether it may be attended."""
    edges = F.pad(audio.int(), (1, 1)).diff(dim=1)  # [R, S+1]
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
    rows = torch.cat([x.to(embeds).flatten(0, -2) for x in audio])
    found = torch.isin(_nh(embeds, b""), _nh(rows, b""))
    return found & (embeds != 0).any(-1)


def fingerprint(
    features: Tensor, mask: Tensor | None = None, *, time: int = 2, key: bytes = b""
) -> list[int]:
    """A keyed hash of 64 bits, a signed integer, of each entry of ``features`` ``[N, ...]``.

    Args:
        features: spectrograms ``[N, bins, frames]``, or waves ``[N, T]`` or ``[N, 1, T]``, of any
            dtype, which has its part in the hash.
        mask: ``[N, frames]``, those that count, also at a lower rate; ``None`` for all.
        time: the dimension of the frames of a spectrogram.
        key: up to 64 bytes.
    """
    return [join([frames], key) for frames in hash_frames(features, mask, time=time, key=key)]


def turn_mark(name: str, key: bytes = b"") -> int:
    """A keyed hash of 64 bits, a signed integer, of the name that a caller gives to a turn."""
    text = name.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, key=key, person=b"turn").digest()
    return int.from_bytes(digest, "little", signed=True)


class Frames(NamedTuple):
    """The hashes of the frames of an entry that count.

    Args:
        kind: the dtype of a frame.
        hashes: ``[T]`` int64.
        length: frames, or samples of a wave, that count.
        whole: whether none of its frames is padding.
    """

    kind: str
    hashes: np.ndarray[Any, np.dtype[np.int64]]
    length: int
    whole: bool = True

    def split(self, lengths: Sequence[int]) -> list[Frames]:
        """The parts of so many frames."""
        ends = np.cumsum([0, *lengths]).tolist()
        return [Frames(self.kind, self.hashes[a:b], b - a) for a, b in pairwise(ends)]


def join(parts: Sequence[Frames], key: bytes) -> int:
    """The fingerprint of a clip whose frames are in several entries."""
    digest = hashlib.blake2b(digest_size=8, key=key)
    for part in parts:
        digest.update(f"{part.kind} {part.length} {len(part.hashes)};".encode())
        digest.update(part.hashes.astype("<i8", copy=False).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def hash_frames(
    features: Tensor, mask: Tensor | None = None, *, time: int = 2, key: bytes = b""
) -> list[Frames]:
    """The hashes that :func:`join` takes, of each entry; arguments as :func:`fingerprint`."""
    x = features.detach()
    kind = str(x.dtype).removeprefix("torch.")
    if x.dim() == 3 and x.shape[1] == 1:
        x = x[:, 0]
    if x.dim() == 2:
        return _of_waves(kind, x, mask, key)
    hashes = _nh(x.movedim(min(time, x.dim() - 1), 1).flatten(2), key)  # [N, T]
    if mask is None:
        return [Frames(kind, row, len(row)) for row in hashes.cpu().numpy()]
    frames = hashes.shape[1]
    shown = (mask != 0).to(x.device).repeat_interleave(max(1, frames // mask.shape[1]), 1)
    shown = F.pad(shown, (0, frames - shown.shape[1])).long()
    both = torch.stack([hashes, shown]).cpu().numpy()  # one transfer from the device
    entries = []
    for row, here in zip(both[0], both[1].astype(bool), strict=True):
        frames, count = row[here], int(here.sum())
        # the last frames of an extractor see what the clip was padded with
        edge = EDGE if x.is_floating_point() and count >= LONG else 0
        entries.append(Frames(kind, frames[: count - edge], count, bool(here.all())))
    return entries


def _of_waves(kind: str, waves: Tensor, mask: Tensor | None, key: bytes) -> list[Frames]:
    """Entries of ``[N, T]``: a device sends all samples, since where they begin is known then."""
    entries = []
    waves, mask = waves.cpu(), None if mask is None else mask.cpu() != 0
    for i, wave in enumerate(waves):
        heard = wave if mask is None or mask[i].all() else wave[mask[i]]
        blocks = F.pad(heard, (0, -len(heard) % SAMPLES)).view(SAMPLES, -1).mT
        entries.append(Frames(kind, _nh(blocks, key).numpy(), len(heard), len(heard) == len(wave)))
    return entries


def _nh(x: Tensor, key: bytes) -> Tensor:
    """NH of the last dimension of ``x`` ``[..., K]``: int64 ``[...]``, the same on every machine.

    ``sum_i (x_i + k_i) (x_j + k_j) mod 2^64``, ``j = i + K/2``, with sums modulo 2^32.
    """
    words = _words(x.detach())
    if words.shape[-1] % 2:
        words = F.pad(words, (0, 1))
    drawn = _key_words(key, words.shape[-1], x.device)
    if _is_native(words):
        from .._cpu.clip_hash import clip_hash

        rows = words.unbind() if words.dim() == 3 else [words]
        return torch.stack([clip_hash(row, drawn) for row in rows]).view(words.shape[:-1])
    a, b = ((w + k).long() for w, k in zip(words.chunk(2, -1), drawn.chunk(2), strict=True))
    return a.mul_(b).sum(-1)


def _is_native(words: Tensor) -> bool:
    from .._cpu.library import is_loaded  # not where only mal_kernels is imported

    return words.device.type == "cpu" and words.numel() > 0 and is_loaded()


def _words(x: Tensor) -> Tensor:
    """The bits of ``x`` ``[..., K]`` as int32, ``[..., K]`` or ``[..., 2 K]``."""
    size = x.element_size()
    if size == 4:
        return x.view(torch.int32)
    if size == 8:
        whole = x.view(torch.int64)
        return torch.cat([whole.int(), (whole >> 32).int()], -1)
    return x.view({1: torch.int8, 2: torch.int16}[size]).int()


@lru_cache(maxsize=64)
def _key_words(key: bytes, count: int, device: torch.device) -> Tensor:
    """``count`` int32 drawn from ``key``."""
    drawn = hashlib.shake_256(b"mal_kernels clip" + key).digest(4 * count)
    return torch.from_numpy(np.frombuffer(drawn, "<i4").astype(np.int32)).to(device)


def windows_of(entries: Sequence[Frames], tokens: Sequence[int]) -> list[Sequence[Frames]] | None:
    """The entries of each clip, of ``tokens``; ``None`` where that cannot be known.

    A clip that is longer than the window of its host is in several entries, all of them full but
    the last, which stand for the same number of tokens.
    """
    if len(entries) == len(tokens):
        return [[entry] for entry in entries]
    if not tokens or len(entries) < len(tokens):
        return None
    width = max(entry.length for entry in entries)
    rate = sum(tokens) * width / max(1, sum(entry.length for entry in entries))
    # rounding takes or adds less than a token for each entry
    near = range(max(1, int(rate) - len(entries)), int(rate) + len(entries) + 2)
    for per_window in sorted(near, key=lambda n: abs(n - rate)):
        ends = np.cumsum([0, *(-(-n // per_window) for n in tokens)]).tolist()
        full = ends[-1] == len(entries) and all(
            entry.whole for a, b in pairwise(ends) for entry in entries[a : b - 1]
        )
        if full:
            return [entries[a:b] for a, b in pairwise(ends)]
    return None
