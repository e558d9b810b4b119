"""The Triton kernels as a device would get them, compiled ahead of time: no spills, matrix instructions, shared memory.

Compilation needs no device; which kernels, specialisations and block sizes are launched is found by calling the ops.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
# backend, architecture, shared memory of a block in bytes, matrix instruction; gfx942 is AMD's MI300
TARGETS = [
    ("cuda", "80", 163 * 1024, "mma.sync"),
    ("cuda", "90", 227 * 1024, "wgmma"),
    ("cuda", "100", 227 * 1024, "tcgen05.mma"),
    ("cuda", "120", 99 * 1024, "mma.sync"),
    ("hip", "gfx942", 64 * 1024, "v_mfma"),
]
KERNELS = {
    "_grouped_logits",
    "_operand_gradient",
    "_normalize",
    "_backward",
    "_column_sums",
    "_fold",
    "_exempt",
    "_sweep",
    "_compare",
    "_keep_largest",
    "_row_loss",
}


def compiled(backend: str, architecture: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "ahead_of_time.py"), backend, architecture],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("backend", "architecture", "shared", "instruction"), TARGETS, ids=lambda v: str(v))
def test_compiles_for(backend: str, architecture: str, shared: int, instruction: str) -> None:
    kernels = compiled(backend, architecture)
    assert {k["kernel"] for k in kernels} == KERNELS
    for k in kernels:
        name = f"{k['kernel']} ({k['case']}, {k['config']})"
        assert k["spills"] == 0, f"{name} spills {k['spills']} bytes"
        assert k["shared"] <= shared, f"{name} takes {k['shared']} bytes of shared memory"
        if k["dots"] and k["precision"] == "ieee" and k["operand"] != "fp32":
            assert instruction in k["instructions"], f"{name} has {k['instructions']}"
        elif k["precision"] == "tf32":
            assert k["instructions"], f"{name} multiplies without tensor cores"
    assert any(k["dots"] for k in kernels)
