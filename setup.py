"""Carries ``csrc/`` into the package and, with ``MAL_BUILD_CUDA=1``, compiles it.

A plain install compiles nothing and gives a wheel for any platform.
"""

import importlib
import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

BUILDS = os.environ.get("MAL_BUILD_CUDA") == "1"
ROOT = Path(__file__).parent


class BuildPackage(build_py):
    """Also copies the sources of kernels, and builds them if asked to."""

    def run(self) -> None:
        """As setuptools asks for."""
        super().run()
        if self.editable_mode:
            return  # a clone has csrc/ beside the package
        package = Path(self.build_lib, "mal_kernels")
        shutil.copytree(
            ROOT / "csrc",
            package / "csrc",
            ignore=shutil.ignore_patterns("emu"),  # for tests
            dirs_exist_ok=True,
        )
        if BUILDS:
            build = cuda_build()
            build.build(build.TARGETS, package / "_cuda" / build.LIBRARY)


class Wheel(bdist_wheel):
    """With the library in it, a wheel is for this platform, but for any Python."""

    def finalize_options(self) -> None:
        """As setuptools asks for."""
        super().finalize_options()
        self.root_is_pure = not BUILDS

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if BUILDS else (python, abi, platform)


def cuda_build():  # noqa: ANN201  (a module)
    """``mal_kernels._cuda.build``, without the package's own imports, which need torch."""
    package = types.ModuleType("mal_kernels")
    package.__path__ = [str(ROOT / "mal_kernels")]
    sys.modules["mal_kernels"] = package
    return importlib.import_module("mal_kernels._cuda.build")


setup(
    cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel},
    setup_requires=["ninja"] if BUILDS else [],
)
