"""What both commands stand on: commands that are shown and checked, interpreters, fresh virtual environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The tools of the environment that runs this come first, whether it is activated or not
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
# Where version managers keep interpreters that need not be on PATH
MANAGED = (
    "~/.pyenv/versions/{version}.*/bin",
    "~/.local/share/uv/python/cpython-{version}.*/bin",
    "~/.local/share/mise/installs/python/{version}.*/bin",
    "~/.asdf/installs/python/{version}.*/bin",
)


class ReleaseError(Exception):
    """What keeps a release from being made, in a line."""


def run(
    command: Sequence[str | Path],
    cwd: Path = ROOT,
    log: Path | None = None,
    check: bool = True,
    capture: bool = False,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command; its output goes to the terminal, to the end of ``log``, or with ``capture`` into the answer.

    Raises :class:`ReleaseError` where there is no such program or, with ``check``, where it fails.
    """
    tool = shutil.which(command[0], path=PATH)
    if tool is None:
        raise ReleaseError(f'{command[0]} is missing: pip install -e ".[release]" brings it')
    variables = clean(os.environ) | {"PATH": PATH, **(environment or {})}
    with log.open("a") if log else nullcontext() as file:
        output = subprocess.PIPE if capture else file
        errors = None if file is None else subprocess.STDOUT
        done = subprocess.run([tool, *command[1:]], cwd=cwd, env=variables, text=True, stdout=output, stderr=errors)
    if check and done.returncode:
        where = f"; see {log}" if log else ""
        raise ReleaseError(f"failed ({done.returncode}){where}: {' '.join(map(str, command))}")
    return done


def clean(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that lead no interpreter to packages outside its environment."""
    return {k: v for k, v in variables.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TDE_CORE"}}


def candidates(version: str) -> Iterator[Path]:
    """Where an interpreter of that version may be, the likeliest first."""
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        yield Path(folder) / f"python{version}"
    for pattern in MANAGED:
        expanded = Path(pattern.format(version=version)).expanduser()
        for managed in sorted(Path("/").glob(str(expanded)[1:]), reverse=True):
            yield managed / f"python{version}"


def interpreter(version: str) -> Path:
    """An interpreter of a version such as "3.12" that runs: what a version manager puts on PATH need not."""
    program = "import sys, venv; print(*sys.version_info[:2], sep='.')"
    for path in candidates(version):
        if path.exists():
            answer = subprocess.run([path, "-I", "-c", program], capture_output=True, text=True)
            if answer.returncode == 0 and answer.stdout.strip() == version:
                return path
    raise ReleaseError(f"there is no Python {version}, neither on PATH nor with pyenv, uv, mise or asdf")


def fresh_environment(folder: Path, python: Path, requirements: Sequence[str | Path], log: Path | None = None) -> Path:
    """A new virtual environment that holds ``requirements``; returns its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    run(["uv", "venv", "--no-project", "--quiet", "--python", python, folder], log=log)
    inside = folder / "bin" / "python"
    run(["uv", "pip", "install", "--quiet", "--python", inside, *requirements], log=log)
    return inside
