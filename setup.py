"""Compiles csrc/ into the wheel when torch and a compiler are at hand; otherwise the first use compiles it."""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from recon3d import _build  # noqa: E402  (imports neither torch nor anything else of the package)


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        try:
            _build.compile_library(ROOT / "csrc", Path(self.build_lib) / "recon3d" / _build.LIBRARY_NAME)
        except _build.BuildError as error:
            if os.environ.get("RECON3D_BUILD") == "1":
                raise
            print(f"recon3d: kernels are compiled on first use ({str(error).splitlines()[0]})")


class WithLibrary(Distribution):
    def has_ext_modules(self):
        return True  # the wheel holds a library, so it belongs to a platform


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]  # no Python symbol in the library


setup(distclass=WithLibrary, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
