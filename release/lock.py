"""``python -m release.lock``: every package of a development environment, pinned and hashed, from pyproject.toml.

``requirements/`` gets a file for what builds the package and one for each of the extras ``dev`` and ``release``, good
for Linux and Python 3.10 to 3.13 at once. Pins that still fit stay; ``--upgrade`` looks for newer ones.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from release.tools import ROOT, ReleaseError, run

FOLDER = ROOT / "requirements"
HELD = FOLDER / "held.txt"
PYPROJECT = ROOT / "pyproject.toml"


def project() -> dict[str, Any]:
    """What is in pyproject.toml."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    found: dict[str, Any] = toml.loads(PYPROJECT.read_text())
    return found


def lock(name: str, sources: list[str | Path], options: list[str]) -> Path:
    """Writes ``requirements/NAME.txt``, and returns it.

    Raises:
        ReleaseError: the requirements contradict each other, or the package index cannot be reached.
    """
    target = FOLDER / f"{name}.txt"
    command: list[str | Path] = ["uv", "pip", "compile", "--no-config", "--quiet", "--universal"]
    command += ["--python-version", "3.10", "--generate-hashes", "--no-annotate"]
    command += ["--custom-compile-command", "make lock", "--constraints", HELD, "--output-file", target]
    run([*command, *options, *sources], capture=True)
    return target


def main() -> None:
    """Locks all. The widest comes first, and the others keep to its pins: all go into one environment."""
    options = sys.argv[1:]
    build = ROOT / "build" / "build.in"  # pip's isolation would fetch these, at whatever version is the newest
    build.parent.mkdir(exist_ok=True)
    build.write_text("\n".join(project()["build-system"]["requires"]))
    try:
        dev = lock("dev", [PYPROJECT, "--extra", "dev"], options)
        options += ["--constraints", str(dev)]
        lock("build", [build], options)
        lock("release", [PYPROJECT, "--extra", "release"], options)
    except ReleaseError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
