"""``python -m release.compat``: the tests against the wheels in ``dist/``, with the oldest and newest of everything.

Every environment is fresh, holds a wheel and what it requires, and is removed when its tests have run. The tests come
from the source distribution with the packages taken out of it, so that they can import nothing but the wheel. Wheels
that ``dist/`` lacks are built first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from release import wheel
from release.tools import ROOT, ReleaseError, fresh_environment, interpreter, run

WORK = ROOT / "build" / "compat"
SHOWN = ("torch", "triton", "numpy", "torchvision", "scikit-learn")
IN_PARALLEL = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}  # see the Makefile's test
ALL = ("tests",)
# What another Python or numpy could break: the package, its checks, ops, heads and backends on the CPU, torch.compile,
# and Triton's kernels, read by this Python and compiled ahead of time for one device, not run
FILES = ("package", "checks", "ops", "heads", "backends", "triton_build")
CORE = (*(f"tests/test_{name}.py" for name in FILES), "-k", "not triton-cpu and (not test_compiles_for or cuda-90)")


@dataclass(frozen=True)
class Environment:
    """What is installed, and which tests run there: pytest's arguments."""

    name: str
    python: str
    requirements: tuple[str, ...]
    tests: tuple[str, ...]


ENVIRONMENTS = (
    Environment("oldest", "3.10", ("torch==2.11.*", "triton==3.6.*", "numpy==1.26.*"), ALL),
    Environment("newest", "3.13", ("torch>=2.14", "numpy>=2"), ALL),
    Environment("python3.10", "3.10", ("torch>=2.14", "numpy>=2"), CORE),
    Environment("python3.11", "3.11", ("torch>=2.14", "numpy>=2"), CORE),
    Environment("python3.12", "3.12", ("torch>=2.14", "numpy>=2"), CORE),
    # Triton 3.6's interpreter makes numbers of arrays as numpy 2.4 no longer does
    Environment("python3.13-torch2.11", "3.13", ("torch==2.11.*", "numpy>=2,<2.4"), CORE),
)


@dataclass
class Result:
    """How the tests of an environment ended; ``problem`` is why they did not run."""

    name: str
    tests: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.passed > 0 and not self.failed and not self.problem


def tests_alone(sdist: Path) -> Path:
    """The source distribution without the packages."""
    wheel.unpack(sdist, WORK)
    folder = WORK / sdist.name.removesuffix(".tar.gz")
    for package in ("tde_kernels", "python_api"):
        shutil.rmtree(folder / package)
    return folder


def versions(python: Path) -> dict[str, str]:
    """Of the interpreter and the packages that matter."""
    program = (
        "import importlib.metadata as m, json, platform, sys;"
        "print(json.dumps({'python': platform.python_version()} | {n: m.version(n) for n in sys.argv[1:]}))"
    )
    found: dict[str, str] = json.loads(run([python, "-I", "-c", program, *SHOWN], capture=True).stdout)
    return found


def read_junit(file: Path, result: Result) -> None:
    """Takes pytest's own account of a run over into ``result``."""
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1


def test(environment: Environment, tree: Path, options: argparse.Namespace, console: Console) -> Result:
    """Makes an environment, tries the wheel in it, runs its tests, removes it."""
    result = Result(environment.name, "all" if environment.tests == ALL else "core", environment.python)
    folder, log, junit = (WORK / f"{environment.name}{suffix}" for suffix in ("", ".log", ".xml"))
    log.unlink(missing_ok=True)
    try:
        with console.status(f"{environment.name}: installing"):
            built = wheel_for(environment.python)
            needed = [f"{built}[dev]", *environment.requirements]
            python = fresh_environment(folder, interpreter(environment.python), needed, log)
            result.versions = versions(python)
        with console.status(f"{environment.name}: {', '.join(f'{k} {v}' for k, v in result.versions.items())}; {log}"):
            start = time.monotonic()
            run([python, "-I", wheel.SMOKE], cwd=Path("/"), log=log)
            command: list[str | Path] = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
            command += ["-n", str(options.workers), "--dist", "worksteal", *environment.tests, *options.pytest]
            run(command, cwd=tree, log=log, check=False, environment=IN_PARALLEL)
            result.seconds = round(time.monotonic() - start, 1)
        if not junit.exists():
            raise ReleaseError(f"pytest wrote no account of its run; see {log}")
        read_junit(junit, result)
    except ReleaseError as error:
        result.problem = str(error)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def wheel_for(version: str) -> Path:
    """The wheel in ``dist/`` for a Python."""
    found = list(wheel.DIST.glob(f"*-cp{version.replace('.', '')}-*.whl"))
    if len(found) != 1:
        raise ReleaseError(f"dist/ must hold one wheel for Python {version}, got {len(found)}; make wheel builds it")
    return found[0]


def build_missing(environments: Sequence[Environment]) -> None:
    """Builds all wheels where one is missing whose Python is here."""
    here = []
    for version in sorted({e.python for e in environments}):
        try:
            interpreter(version)
            here.append(version)
        except ReleaseError:
            continue  # its environments say so
    if not all(list(wheel.DIST.glob(f"*-cp{version.replace('.', '')}-*.whl")) for version in here):
        wheel.release(here)


def table(results: Sequence[Result]) -> Table:
    """All environments, as people read them."""
    shown = Table("environment", "Python", *SHOWN[:3], "tests", "passed", "skipped", "failed", "minutes")
    for r in results:
        found = [r.versions.get(name, "") for name in ("python", *SHOWN[:3])]
        counts = [str(r.passed), str(r.skipped), str(len(r.failed)), f"{r.seconds / 60:.1f}"]
        shown.add_row(r.name, *found, r.tests, *counts, style="" if r.ok else "red")
    return shown


def write(path: Path, results: Sequence[Result]) -> dict[str, Any]:
    """Writes the results, among those of environments that did not run this time; returns all."""
    commit = run(["git", "rev-parse", "--short", "HEAD"], capture=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {'a GPU' if shutil.which('nvidia-smi') else 'no GPU'}"
    run_now = {"date": date.today().isoformat(), "commit": commit, "machine": machine}
    known = json.loads(path.read_text())["environments"] if path.exists() else {}
    known |= {result.name: {**asdict(result), **run_now} for result in results}
    content = {
        "command": "make compat",
        "environments": {e.name: known[e.name] for e in ENVIRONMENTS if e.name in known},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return content


def markdown(content: dict[str, Any]) -> str:
    """The table of docs/trust.md, from what :func:`write` returns."""
    lines = ["| Python | torch | triton | numpy | tests | passed | skipped | failed | minutes |"]
    lines += ["|---|---|---|---|---|---:|---:|---:|---:|"]
    for e in content["environments"].values():
        found = [e["versions"].get(name, "") for name in ("python", *SHOWN[:3])]
        counts = [e["passed"], e["skipped"], len(e["failed"]), f"{e['seconds'] / 60:.0f}"]
        lines.append(f"| {' | '.join(map(str, [*found, e['tests'], *counts]))} |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m release.compat", description=__doc__)
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("only", nargs="*", metavar="ENVIRONMENT", help=f"of {', '.join(names)}; all if none is named")
    parser.add_argument("--workers", default="auto", help="processes that run tests (auto: one a core)")
    parser.add_argument("--skip-missing", action="store_true", help="a Python that is not here is no failure")
    parser.add_argument("--keep", action="store_true", help="leave the environments in build/compat")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, such as docs/results/compat.json")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="what follows goes to pytest")
    options = parser.parse_args()
    if unknown := set(options.only) - set(names):
        parser.error(f"ENVIRONMENT must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    options, console = arguments(), Console()
    wanted = [e for e in ENVIRONMENTS if not options.only or e.name in options.only]
    build_missing(wanted)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    tree = tests_alone(next(wheel.DIST.glob("*.tar.gz")))
    results = []
    for environment in wanted:
        results.append(test(environment, tree, options, console))
        console.print(table(results[-1:]))
    console.print(table(results))
    for result in results:
        for line in [*result.failed, *filter(None, [result.problem])]:
            console.print(f"{result.name}: {line}", style="red", markup=False)
    if options.json:
        print(markdown(write(options.json, results)))
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ReleaseError as error:
        sys.exit(str(error))
