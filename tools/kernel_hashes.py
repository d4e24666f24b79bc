"""Prints a hash of every kernel's machine code, so that a change can show that it changed none.

Run it in two checkouts with the same Triton and nvcc and compare what it prints::

    python -m tools.kernel_hashes > after.txt
    PYTHONPATH=../before python tools/kernel_hashes.py > before.txt && diff before.txt after.txt

A line is ``triton kernel example hash`` or ``nvcc hash``. Hashed are the instructions and
constants of a binary, not its debug information, which names source lines. Triton's binaries
are those of every ``EXAMPLES`` on sm_90, nvcc's those of ``csrc/`` for sm_90a.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mal_kernels._cuda import build
from mal_kernels._native.build import BuildError
from mal_kernels._triton import aot

TARGET = "sm_90"
CODE = (".text", ".nv.constant", ".nv.global")


def sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of every section of an ELF file of 64 bits, little endian."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    # name, type, flags, address, offset, size
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    names = headers[names_at]
    for name, kind, _, _, offset, length in headers:
        at = names[4] + name
        label = cubin[at : cubin.index(b"\0", at)].decode()
        yield label, b"" if kind == 8 else cubin[offset : offset + length]  # 8: no bits in the file


def digest(cubin: bytes) -> str:
    """A hash of what a GPU executes."""
    code = sorted(content for name, content in sections(cubin) if name.startswith(CODE))
    return hashlib.sha256(b"".join(code)).hexdigest()[:20]


def of_triton() -> Iterator[str]:
    """A line for every launch of every example."""
    for module in aot.kernel_modules().values():
        for example, launch in getattr(module, "EXAMPLES", {}).items():
            with aot.compiling_for(TARGET) as launched:
                launch()
            for kernel, binary in launched:
                yield f"triton {kernel} {example} {digest(binary.asm['cubin'])}"


def of_nvcc() -> Iterator[str]:
    """A line for the code and for the constants of every function; names may change in a move."""
    try:
        nvcc = build.find_nvcc()
    except BuildError as error:
        print(f"csrc is left out: {error}", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def compiled(source: Path) -> bytes:
            cubin = Path(folder, source.stem + ".cubin")
            flags = [f for f in build.FLAGS if not f.startswith("-Xcompiler")]
            command = [nvcc, *flags, '-DMAL_TARGETS="90a"', "-arch=sm_90a", "-cubin"]
            subprocess.run([*command, source, "-o", cubin], check=True)
            return cubin.read_bytes()

        for cubin in pool.map(compiled, build.sources()):
            for name, content in sections(cubin):
                if name.startswith(CODE) and content:
                    yield f"nvcc {hashlib.sha256(content).hexdigest()[:20]}"


if __name__ == "__main__":
    print("\n".join(sorted([*of_triton(), *of_nvcc()])))
