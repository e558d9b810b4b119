"""Runs the tests of the ``cuda`` backend without a GPU: its kernels' source, compiled for the CPU (``csrc/emulator``).

``python tests/emulated.py [pytest's arguments]`` builds that core in ``build/emulated``, runs the emulator's own test,
and then every test of the suite that takes a backend with the kernels as one; those of logits once more for each way
of computing them. Without a CUDA toolkit it says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11

from tde_kernels.backends import core

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulated"
OF_LOGITS = ("background_exempt", "ema", "logits")


def build() -> Path:
    """The emulated core."""
    options = [
        "-DTDE_EMULATOR=ON",
        "-DTDE_PYTHON=ON",
        "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",  # pybind11's, which takes longer than it saves
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (["-S", ROOT, "-B", BUILD, "-G", "Ninja", *options], ["--build", BUILD]):
        subprocess.run(["cmake", *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return next(BUILD.glob("_C*"))


def main() -> int:
    built = core.missing or core.compiled().build_info()
    if isinstance(built, str) or not built.has_cuda:
        print(f"the CUDA kernels are not tested: {built if isinstance(built, str) else built.cuda}")
        return 0
    module = build()
    subprocess.run([BUILD / "simt_test"], check=True)
    of_logits = [f"tests/test_{name}.py" for name in OF_LOGITS]
    files = {"table": ["tests"]} | dict.fromkeys(("tiled", "hopper", "product"), of_logits)
    results = [
        subprocess.run(
            [sys.executable, "-m", "pytest", *paths, "-k", "cuda-cpu", *sys.argv[1:]],
            cwd=ROOT,
            env={**os.environ, "TDE_CORE": str(module), "TDE_CUDA_PLAN": plan},
        ).returncode
        for plan, paths in files.items()
    ]
    return max(results)


if __name__ == "__main__":
    sys.exit(main())
