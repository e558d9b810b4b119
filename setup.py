"""Builds the compiled core, ``tde_kernels._C``, with CMake. All metadata is in pyproject.toml.

Environment: ``TDE_CUDA=0`` leaves the CUDA kernels out, ``TDE_CUDA=1`` refuses to build without them,
``TDE_CUDA_ARCHS="80;90a"`` picks architectures, ``CMAKE_ARGS`` is passed on. ``TDE_BUILD_DIR`` names the folder to
build in: what was compiled there for one Python serves the next, all but the bindings.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds the CMake project at the root; ninja and cmake come from the build requirements."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        kept = os.environ.get("TDE_BUILD_DIR")
        build = Path(kept or self.build_temp).resolve()
        # pip's build environment, and with it ninja and pybind11, lies elsewhere every time
        forget = [f"-U{pattern}" for pattern in ("*Python*", "*PYTHON_*", "*pybind11*", "CMAKE_MAKE_PROGRAM")]
        subprocess.run(
            [
                "cmake",
                *(forget if kept else ["--fresh"]),
                *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                "-DTDE_PYTHON=ON",
                f"-DTDE_VERSION={self.distribution.get_version()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True)


setup(ext_modules=[Extension("tde_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
