"""``python -m mal_kernels._cuda``: build the CUDA library ahead of its first use."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .._native.build import BuildError
from .build import TARGETS, build, cached, target_of


def main() -> int:
    """Builds for the GPUs of this machine (without one: for all targets), unless already built."""
    parser = argparse.ArgumentParser(prog="python -m mal_kernels._cuda", description=main.__doc__)
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, help="compute capabilities, e.g. 80 90a"
    )
    parser.add_argument("--out", type=Path, help="the library; in the user's cache if left out")
    options = parser.parse_args()
    devices = range(torch.cuda.device_count())
    try:
        here = [target_of(torch.cuda.get_device_capability(i)) for i in devices]
        targets = sorted(set(options.targets or here or TARGETS))
        if options.out:
            build(targets, options.out)
        library = options.out or cached(targets)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
