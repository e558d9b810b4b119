"""``python -m release.wheel``: a source distribution of the last commit, and from it a checked wheel for each Python.

All is built anew: the C++ and CUDA objects once, the bindings for each Python. A wheel that is left in ``dist/`` has
passed twine, auditwheel and, in a fresh environment far from the sources, :mod:`release.smoke`.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from release.tools import ROOT, ReleaseError, fresh_environment, interpreter, run

WORK = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
SMOKE = Path(__file__).with_name("smoke.py")
# torch ships a libgomp of the same name and has it loaded before the core asks for it: one pool of threads serves both.
# A copy grafted into the wheel would be a second pool, which fights the first for the cores.
SHARED_WITH_TORCH = "libgomp.so.1"


@dataclass(frozen=True)
class Built:
    """A wheel in ``dist/``."""

    path: Path
    python: str
    cuda: str
    seconds: float


def source_distribution(console: Console) -> Path:
    """Builds the sdist from the last commit, in ``dist/``."""
    tree = WORK / "commit"
    tree.mkdir()
    archive = WORK / "commit.tar"
    run(["git", "archive", "--output", archive, "HEAD"])
    unpack(archive, tree)
    if run(["git", "diff", "--quiet", "HEAD"], check=False).returncode:
        console.print("[yellow]There are changes that are not committed: they are not in it.")
    run(["uv", "build", "--sdist", "--quiet", "--out-dir", DIST, tree])
    return next(DIST.glob("*.tar.gz"))


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a tar file of our own."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def build(source: Path, version: str) -> Built:
    """Builds a wheel from the unpacked sdist, with what compiling another Python's has left, and has it audited."""
    start = time.monotonic()
    python = interpreter(version)
    raw = WORK / "raw" / version
    options = {"TDE_BUILD_DIR": str(WORK / "core"), "CMAKE_ARGS": "-DTDE_COMPACT=ON"}
    run(["uv", "build", "--wheel", "--quiet", "--python", python, "--out-dir", raw, source], environment=options)
    repaired = WORK / "repaired" / version
    wheel = next(raw.glob("*.whl"))
    run(["auditwheel", "repair", "--exclude", SHARED_WITH_TORCH, "--wheel-dir", repaired, wheel])
    path = Path(shutil.move(next(repaired.glob("*.whl")), DIST))
    return Built(path, version, cuda(path, python), time.monotonic() - start)


def cuda(wheel: Path, python: Path) -> str:
    """What the wheel's core says of its CUDA kernels; it needs nothing beside it to load."""
    folder = WORK / "core_of" / wheel.stem
    with zipfile.ZipFile(wheel) as file:
        core = file.extract(next(n for n in file.namelist() if n.startswith("tde_kernels/_C.")), folder)
    program = "import sys; sys.path.insert(0, sys.argv[1]); import _C; print(_C.build_info().cuda)"
    return run([python, "-I", "-c", program, Path(core).parent], capture=True).stdout.strip()


def tried(wheel: Built) -> None:
    """Runs an installed wheel, and a training of its trainer, in a fresh environment far from the sources."""
    folder = WORK / "fresh" / wheel.python
    python = fresh_environment(folder, interpreter(wheel.python), [f"{wheel.path}[train]"])
    with TemporaryDirectory() as elsewhere:
        run([python, "-I", "-m", "tde_kernels"], Path(elsewhere))
        run([python, "-I", SMOKE], Path(elsewhere))
        run([python.with_name("tde"), "train", "digits_lt", "seeds=[0]", "train.epochs=1"], Path(elsewhere))
    shutil.rmtree(folder)


def summary(wheels: Sequence[Built]) -> Table:
    """What was built."""
    table = Table("wheel", "MB", "seconds", "CUDA core")
    for wheel in wheels:
        size = wheel.path.stat().st_size / 1e6
        table.add_row(wheel.path.name, f"{size:.1f}", f"{wheel.seconds:.0f}", wheel.cuda)
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m release.wheel", description=__doc__)
    here = ".".join(platform.python_version_tuple()[:2])
    parser.add_argument("--pythons", nargs="+", default=[here], metavar="X.Y", help=f"Pythons to build for ({here})")
    parser.add_argument("--no-smoke", action="store_true", help="build and audit only: install the wheels nowhere")
    return parser.parse_args()


def release(pythons: Sequence[str], smoke: bool = True) -> None:
    """Fills ``dist/`` with the source distribution and a wheel for each Python, and says what is in it."""
    console = Console()
    for folder in (WORK, DIST):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    sdist = source_distribution(console)
    unpack(sdist, WORK)
    wheels = [build(WORK / sdist.name.removesuffix(".tar.gz"), version) for version in pythons]
    run(["twine", "check", "--strict", sdist, *(wheel.path for wheel in wheels)])
    for wheel in wheels:
        run(["auditwheel", "show", wheel.path])
        if smoke:
            tried(wheel)
    console.print(summary(wheels))
    console.print(f"and {sdist.name}, in {DIST}")


def main() -> None:
    options = arguments()
    release(options.pythons, smoke=not options.no_smoke)


if __name__ == "__main__":
    try:
        main()
    except ReleaseError as error:
        sys.exit(str(error))
