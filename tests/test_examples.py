"""The examples run, on settings that take seconds, and print the table that they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SETTINGS = {
    "quick_start": ["--epochs", "2", "--seeds", "1"],
    "own_network": ["--epochs", "1", "--size", "32"],
    "post_hoc_tde": ["--epochs", "2", "--seeds", "1"],
    "detection": ["--steps", "2"],
    "class_parallel": ["--epochs", "1"],
}


def run(name: str, *arguments: str, processes: int = 1) -> str:
    """What an example prints; it has no network, and one thread."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / f"{name}.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py") if "argparse" in path.read_text()}
    assert scripts == SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_example(name: str) -> None:
    printed = run(name, *SETTINGS[name], processes=2 if name == "class_parallel" else 1).splitlines()
    heading = next(i for i, line in enumerate(printed) if line.startswith("test accuracy in %"))
    assert printed[heading].split()[4:] == ["many", "medium", "few", "overall"]
    rows = printed[heading + 1 :]
    assert len(rows) >= 2 and any("TDE" in row for row in rows)
    for row in rows:
        assert all(0 <= float(cell) <= 100 for cell in row[24:].split())
