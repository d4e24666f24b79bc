"""Carries ``csrc/`` into the package; ``MAL_BUILD_CUDA=1``, ``MAL_BUILD_CPU=1`` compile it too.

A plain install compiles nothing and gives a wheel for any platform.
"""

import importlib
import os
import platform
import shutil
import sys
import types
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CUDA, CPU = (os.environ.get(f"MAL_BUILD_{name}") == "1" for name in ("CUDA", "CPU"))
ROOT = Path(__file__).parent


class BuildPackage(build_py):
    """Copies the sources of kernels too, and builds them if asked to."""

    def run(self) -> None:
        """Does what setuptools asks of a command."""
        super().run()
        if self.editable_mode:
            return  # a clone has csrc/ beside the package
        package = Path(self.build_lib, "mal_kernels")
        shutil.copytree(
            ROOT / "csrc",
            package / "csrc",
            ignore=shutil.ignore_patterns("emu", "ptx"),  # for tests
            dirs_exist_ok=True,
        )
        if CUDA:
            build = builder("_cuda")
            build.build(build.TARGETS, package / "_cuda" / build.LIBRARY)
        if CPU:
            build = builder("_cpu")
            for target in build.targets_of(platform.machine()):
                build.build(target, package / "_cpu" / build.library_name(target))


class Wheel(bdist_wheel):
    """With the library in it, a wheel is for this platform, but for any Python."""

    def finalize_options(self) -> None:
        """Does what setuptools asks of a command."""
        super().finalize_options()
        self.root_is_pure = not (CUDA or CPU)

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        python, abi, system = super().get_tag()
        return ("py3", "none", system) if CUDA or CPU else (python, abi, system)


def builder(backend: str) -> types.ModuleType:
    """The ``build`` module of a backend, without the package's own imports, which need torch."""
    package = types.ModuleType("mal_kernels")
    package.__path__ = [str(ROOT / "mal_kernels")]
    sys.modules["mal_kernels"] = package
    return importlib.import_module(f"mal_kernels.{backend}.build")


setup(
    cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel},
    setup_requires=["ninja"] if CUDA else [],
)
