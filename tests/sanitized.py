"""Runs the compiled core of the CPU under GCC's sanitizers: the tests of its C API, then those of the ops through it.

``python tests/sanitized.py [--c-api] [address] [thread]`` builds in ``build/sanitized`` what is named, or both:

* ``address``: AddressSanitizer, UndefinedBehaviorSanitizer, and for the C API LeakSanitizer;
* ``thread``: ThreadSanitizer, with OpenMP's loops carried out by ``std::thread`` (``csrc/tests/openmp.cpp``).

With ``--c-api`` the ops are left out. Python, torch and the bindings are not instrumented: of them no report can come.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitized"
CORES = len(os.sched_getaffinity(0))
# cmake, ctest and ninja may be those of the virtual environment
TOOLS = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
FILES = [f"tests/test_{name}.py" for name in ("logits", "ema", "background_exempt", "alpha", "loss", "backends")]


# Of each kind, GCC's library that comes before all others where Python runs, and its options. What Python and torch
# leave behind at their end is not ours to mend: leaks are looked for in the tests of the C API.
KINDS = {
    "address": ("asan", {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}),
    "thread": ("tsan", {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}),
}


def build(kind: str, python: bool) -> Path:
    """The core and its tests under the sanitizer of ``kind``; the folder that they are in."""
    folder = BUILD / kind
    options = [
        f"-DTDE_SANITIZE={kind}",
        "-DTDE_TESTS=ON",
        f"-DTDE_PYTHON={'ON' if python else 'OFF'}",
        "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",  # pybind11's, which takes longer than it saves
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    environment = {**TOOLS, "CXX": "g++"}
    for command in (["-S", ROOT, "-B", folder, "-G", "Ninja", *options], ["--build", folder]):
        subprocess.run(["cmake", *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return folder


def library(name: str) -> str:
    """The path of one of GCC's libraries."""
    found = subprocess.run(["g++", f"-print-file-name=lib{name}.so"], check=True, capture_output=True, text=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"g++ has no lib{name}: install GCC with its sanitizers (on Debian and Ubuntu: apt install g++)")
    return path


def check(kind: str, ops: bool) -> bool:
    """Whether the core passes its tests, and if asked for those of the ops, under ``kind``."""
    start = time.monotonic()

    def passes(what: str, command: Sequence[object], **environment: str) -> bool:
        passed = subprocess.run([*map(str, command)], cwd=ROOT, env={**TOOLS, **environment}).returncode == 0
        seconds = time.monotonic() - start
        print(f"{kind}: {what} {'passed' if passed else 'FAILED'}, {seconds:.0f} s from the start", flush=True)
        return passed

    folder = build(kind, ops)
    ctest = ["ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error", "-j", CORES]
    passed = passes("the C API", ctest)
    if not ops:
        return passed
    runtime, options = KINDS[kind]
    environment = {
        **options,
        "LD_PRELOAD": f"{library(runtime)} {library('stdc++')}",
        "TDE_CORE": str(next(folder.glob("_C*"))),
        "OMP_NUM_THREADS": "2",
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES, "-k", "cpu-cpu"]
    return passes("the ops", pytest, **environment) and passed


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the compiled core under sanitizers.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; both if none is named")
    parser.add_argument("--c-api", action="store_true", help="leave the tests of the ops out")
    arguments = parser.parse_args()
    if shutil.which("g++") is None:
        sys.exit("the sanitizers are GCC's: install it (on Debian and Ubuntu: apt install g++)")
    kinds = arguments.kinds or [*KINDS]
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"there is no {', '.join(sorted(unknown))}: name some of {', '.join(KINDS)}")
    return 0 if all([check(kind, not arguments.c_api) for kind in kinds]) else 1


if __name__ == "__main__":
    sys.exit(main())
