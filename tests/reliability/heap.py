"""What memory a process uses, and what of it the allocator only keeps: Linux with glibc."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


class _MallInfo2(ctypes.Structure):
    """``struct mallinfo2``, of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@cache
def _libc() -> Any:
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _MallInfo2
    return libc


def resident_mib(process: int | str = "self") -> float:
    """Memory in use by a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def allocated_mib() -> float:
    """What this process has asked of malloc and not freed, in all arenas and mapped blocks.

    Resident memory beyond this is the code of libraries, and memory that was freed and that malloc
    keeps for later: in pieces, and in an arena for each of many threads.
    """
    info = _libc().mallinfo2()
    return float(info.uordblks + info.hblkhd) / 2**20


def trimmed_mib() -> float:
    """Memory in use by this process once malloc has given back what it can."""
    _libc().malloc_trim(0)
    return resident_mib()


def by_fifths(values: Sequence[float]) -> list[float]:
    """Means of five equal parts."""
    return [round(float(part.mean()), 1) for part in np.array_split(np.array(values), 5)]
