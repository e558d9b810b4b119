"""Classes on two and on four ranks: every check of ``class_parallel_job.py``, all in one start; and on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
JOB = Path(__file__).with_name("class_parallel_job.py")


def run(ranks: int, folder: Path, names: list[str], on_gpus: bool = False) -> dict[str, dict[str, str]]:
    """What is wrong in each check, by rank."""
    results = folder / "results.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(JOB)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""})
    command = [*launch, str(results), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert results.exists(), done.stdout + done.stderr
    found: dict[str, dict[str, str]] = json.loads(results.read_text())
    assert list(found) == names, f"it ended after {list(found)[-1]}: {done.stderr}"
    return found


def assert_all_right(found: dict[str, dict[str, str]]) -> None:
    wrong = [f"{name}, rank {rank}: {text}" for name, faults in found.items() for rank, text in faults.items()]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks(ranks: int, tmp_path: Path) -> None:
    from class_parallel_job import checks_of

    assert_all_right(run(ranks, tmp_path, checks_of(ranks)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_gpus(tmp_path: Path) -> None:
    names = ["every_option", "some_classes_at_a_time", "messages"]
    assert_all_right(run(2, tmp_path, names, on_gpus=True))
