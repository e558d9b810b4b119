"""Runs the tests of the ``cuda`` backend without a GPU: its kernels' source, compiled for the CPU (``csrc/emulator``).

``python tests/emulated.py [pytest's arguments]`` builds that core in ``build/emulated``, runs the emulator's own test,
and then every test of the suite that takes a backend with the kernels as one; those of logits once more for each way
of computing them, with a normalizer for each kind of factor. Without a CUDA toolkit it says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pybind11

from tde_kernels.backends import core

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulated"
# Their factors are another's with other numbers, which no way of computing logits looks at
ALIKE = "cosine or capsule"
OF_LOGITS = tuple(f"tests/test_{name}.py" for name in ("background_exempt", "ema", "logits"))


def missing() -> str | None:
    """Why the kernels are not emulated here, or None: it takes the toolkit, for its 16-bit types."""
    if core.missing is not None:
        return core.missing
    built = core.compiled().build_info()
    return None if built.has_cuda else str(built.cuda)


def build(folder: Path, *options: str) -> Path:
    """The emulated core, and beside it ``simt_test``."""
    options = (
        "-DTDE_EMULATOR=ON",
        "-DTDE_PYTHON=ON",
        "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",  # pybind11's, which takes longer than it saves
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (["-S", ROOT, "-B", folder, "-G", "Ninja", *options], ["--build", folder]):
        subprocess.run(["cmake", *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return next(folder.glob("_C*"))


def passes(module: Path, paths: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the tests in ``paths`` pass by the table of ways, and those of logits by each way."""
    chosen = {"table": (paths, "cuda-cpu")}
    chosen |= dict.fromkeys(("tiled", "hopper", "product"), (OF_LOGITS, f"cuda-cpu and not ({ALIKE})"))
    results = [
        subprocess.run(
            [sys.executable, "-m", "pytest", *files, "-k", words, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment, "TDE_CORE": str(module), "TDE_CUDA_PLAN": plan},
        ).returncode
        for plan, (files, words) in chosen.items()
    ]
    return not any(results)


def main() -> int:
    why = missing()
    if why is not None:
        print(f"the CUDA kernels are not tested: {why}")
        return 0
    module = build(BUILD)
    subprocess.run([BUILD / "simt_test"], check=True)
    return 0 if passes(module, ["tests"], sys.argv[1:], {}) else 1


if __name__ == "__main__":
    sys.exit(main())
