"""``python -m bench.gpu_check``: builds, tests, sanitises and measures on the GPU at hand, offline, in nine minutes.

Writes ``bench/results/<device>-<date>.json``: the machine, each step with its command and how it ended, and what the
benchmarks found, in the form of the suite's own files.
A step that fails or runs out of its time is written down as such; the exit status then is 1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BUDGET = 530.0  # seconds for all of it
KEPT = 90.0  # of them for the benchmarks
# Small cases of every kernel: the sanitizer makes each some hundred times slower
SANITISED = "test_every_plan and deconfound or test_the_ema_rides_along or test_background_exempt_over_tiles"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Step:
    """A command and how it ended."""

    name: str
    command: str
    status: str
    seconds: float
    summary: str


def run(name: str, command: list[str], limit: float, **environment: str) -> Step:
    """Runs a step for at most ``limit`` seconds; its last line of output is the summary."""
    start = time.monotonic()
    shown = " ".join([*(f"{key}={value}" for key, value in environment.items()), *command])
    print(f"{name}: {shown}", flush=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, timeout=max(limit, 1), capture_output=True, text=True
        )
        output, status = done.stdout + done.stderr, "ok" if done.returncode == 0 else f"failed ({done.returncode})"
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")
        status = f"ran out of its {limit:.0f} s"
    lines = [line for line in output.splitlines() if line.strip()]
    if status != "ok":
        print("\n".join(lines[-40:]), flush=True)
    step = Step(name, shown, status, round(time.monotonic() - start, 1), lines[-1].strip("= ") if lines else "")
    print(f"{name}: {step.status} in {step.seconds} s: {step.summary}", flush=True)
    return step


def architecture() -> str:
    """The device's own, as CMake names it: the one that has to be built here."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"


def sanitizer() -> str | None:
    """compute-sanitizer, from PATH or beside the toolkit that torch would compile with."""
    from torch.utils.cpp_extension import CUDA_HOME

    beside = str(Path(CUDA_HOME) / "bin") if CUDA_HOME else None
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def steps(deadline: float) -> list[Step]:
    """All steps but the benchmarks."""

    def left() -> float:
        return deadline - time.monotonic() - KEPT

    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    install = [*python, "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    done = [run("build", install, 180, TDE_CUDA="1", TDE_CUDA_ARCHS=architecture())]
    if done[0].status != "ok":
        return done
    done.append(run("what was built", [*python, "tde_kernels"], 60))
    done.append(run("cuda kernels", [*tests, "tests/test_cuda_kernels.py"], min(60, left())))
    tool = sanitizer()
    for check in TOOLS if tool else ():
        command = [str(tool), "--tool", check, "--error-exitcode", "9", "--target-processes", "all"]
        command += [*tests, "tests/test_cuda_kernels.py", "-k", SANITISED]
        done.append(run(f"compute-sanitizer {check}", command, min(60, left())))
    if tool is None:
        done.append(Step("compute-sanitizer", "", "not found", 0.0, "neither on PATH nor beside the toolkit"))
    done.append(run("cuda backend", [*tests, "tests", "-k", "cuda-cuda"], min(120, left())))
    done.append(run("gpu tests", [*tests, "tests", "-m", "gpu"], left()))
    done.append(run("triton backend", [*tests, "tests", "-k", "triton-cuda"], left()))
    return done


def suite(seconds: float) -> tuple[Step, dict[str, Any] | None]:
    """The benchmark suite on the GPU, and its results; it stops by itself before it would be stopped."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "suite.json"
        command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
        command += ["--device", "cuda", "--quick", f"--stop-after={0.75 * seconds:.0f}", f"--benchmark-json={file}"]
        done = run("benchmarks", command, seconds)
        return done, json.loads(file.read_text()) if file.exists() and file.stat().st_size else None


def machine() -> dict[str, Any]:
    """Device, versions and commit."""
    import tde_kernels

    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "commit": commit,
        "versions": tde_kernels.info().versions | {"cuda": torch.version.cuda},
        "build": tde_kernels.info().build,
    }


def write(results: dict[str, Any]) -> Path:
    """Writes the results file, whole or not at all."""
    device = re.sub(r"[^a-z0-9]+", "-", results["machine"]["device"].lower()).strip("-")
    path = RESULTS / f"{device}-{results['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)
    return path


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and torch sees none")
        return 2
    deadline = time.monotonic() + BUDGET
    done = steps(deadline)
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": "python -m bench.gpu_check",
        "machine": machine(),
        "steps": [asdict(step) for step in done],
    }
    print(f"written: {write(results)}")  # before the benchmarks, which may find a kernel that hangs
    last, found = suite(deadline - time.monotonic())
    results["steps"].append(asdict(last))
    results["suite"] = found
    print(f"written: {write(results)}")
    return 0 if all(step.status == "ok" for step in [*done, last]) else 1


if __name__ == "__main__":
    sys.exit(main())
