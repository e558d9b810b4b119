"""Runs the compiled core under GCC's sanitizers: the tests of its C API, then those of the ops through it.

``python tests/sanitized.py [--c-api] [address] [thread] [cuda]`` builds in ``build/sanitized`` what is named, or all:

* ``address``: AddressSanitizer, UndefinedBehaviorSanitizer, and for the C API LeakSanitizer;
* ``thread``: ThreadSanitizer, with OpenMP's loops carried out by ``std::thread`` (``csrc/tests/openmp.cpp``);
* ``cuda``: the CUDA kernels, emulated on the CPU (``tests/emulated.py``), under the first two of ``address``.

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

import emulated
import pybind11

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitized"
QUIETLY = ("-q", "-x", "-p", "no:cacheprovider")
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


def preloaded(kind: str) -> dict[str, str]:
    """The environment in which Python runs with a core under the sanitizer of ``kind``."""
    runtime, options = KINDS[kind]
    return {**options, "LD_PRELOAD": f"{library(runtime)} {library('stdc++')}"}


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


def check_cpu(kind: str, ops: bool) -> bool:
    """Whether the core passes its tests, and if asked for those of the ops, under ``kind``."""
    start = time.monotonic()

    def passes(what: str, command: Sequence[object], **environment: str) -> bool:
        passed = subprocess.run([*map(str, command)], cwd=ROOT, env={**TOOLS, **environment}).returncode == 0
        return said(kind, what, passed, start)

    folder = build(kind, ops)
    ctest = ["ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error", "-j", CORES]
    passed = passes("the C API", ctest)
    if not ops:
        return passed
    environment = {"TDE_CORE": str(next(folder.glob("_C*"))), "OMP_NUM_THREADS": "2", **preloaded(kind)}
    pytest = [sys.executable, "-m", "pytest", *QUIETLY, *FILES, "-k", "cpu-cpu"]
    return passes("the ops", pytest, **environment) and passed


def check_cuda() -> bool:
    """Whether the emulated CUDA kernels pass the tests of the ops with no address out of bounds."""
    why = emulated.missing()
    if why is not None:
        print(f"cuda: not run: {why}")
        return True
    start = time.monotonic()
    module = emulated.build(BUILD / "cuda", "-DTDE_SANITIZE=address", "-DCMAKE_CXX_COMPILER=g++")
    options = KINDS["address"][1]
    fault = [module.with_name("simt_test"), "read_past_the_end"]
    report = subprocess.run(fault, env={**os.environ, **options}, capture_output=True, text=True).stderr
    passed = said("cuda", "a fault on purpose", "AddressSanitizer: heap-buffer-overflow" in report, start)
    arguments = [*QUIETLY, "-n", str(CORES), "--dist", "worksteal"]
    environment = {"OMP_NUM_THREADS": "1", **preloaded("address")}
    return said("cuda", "the ops", emulated.passes(module, FILES, arguments, environment), start) and passed


def said(kind: str, what: str, passed: bool, start: float) -> bool:
    """Says how it went; returns ``passed``."""
    seconds = time.monotonic() - start
    print(f"{kind}: {what} {'passed' if passed else 'FAILED'}, {seconds:.0f} s from the start", flush=True)
    return passed


def check(kind: str, ops: bool) -> bool:
    return check_cuda() if kind == "cuda" else check_cpu(kind, ops)


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the compiled core under sanitizers.")
    offered = (*KINDS, "cuda")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(offered)}; all if none is named")
    parser.add_argument("--c-api", action="store_true", help="leave the tests of the ops out")
    arguments = parser.parse_args()
    if shutil.which("g++") is None:
        sys.exit("the sanitizers are GCC's: install it (on Debian and Ubuntu: apt install g++)")
    kinds = arguments.kinds or [*KINDS] if arguments.c_api else arguments.kinds or [*offered]
    if unknown := set(kinds) - set(KINDS if arguments.c_api else offered):
        parser.error(f"there is no {', '.join(sorted(unknown))} here: name some of {', '.join(offered)}")
    return 0 if all([check(kind, not arguments.c_api) for kind in kinds]) else 1


if __name__ == "__main__":
    sys.exit(main())
