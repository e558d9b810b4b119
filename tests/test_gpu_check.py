"""The GPU check's own machinery, as far as it runs without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_check


def test_a_step_says_how_it_ended() -> None:
    done = gpu_check.run("fine", [sys.executable, "-c", "print('one\\ntwo')"], 30, TDE_TEST="1")
    assert (done.status, done.summary) == ("ok", "two") and done.command.startswith("TDE_TEST=1 ")
    failed = gpu_check.run("not fine", [sys.executable, "-c", "raise SystemExit(3)"], 30)
    assert failed.status == "failed (3)"
    slow = gpu_check.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert slow.status == "ran out of its 1 s" and slow.seconds < 30


def test_results_are_named_after_device_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    results = {"machine": {"device": "NVIDIA H200"}, "date": "2026-11-24", "steps": []}
    path = gpu_check.write(results)
    assert path.name == "nvidia-h200-2026-11-24.json" and json.loads(path.read_text()) == results
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main() == 2 and "torch sees none" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmarks_are_a_step() -> None:
    step, found = gpu_check.suite(120)
    assert step.status == "failed (4)" and found is None  # a usage error
    assert "--device cuda --quick --stop-after=90" in step.command
    assert "--device must be one of cpu, got cuda" in step.summary


def test_what_is_sanitised_exists() -> None:
    tests = (Path(__file__).parent / "test_cuda_kernels.py").read_text()
    for name in ("test_every_plan", "test_the_ema_rides_along", "test_background_exempt_over_tiles"):
        assert name in gpu_check.SANITISED and f"def {name}(" in tests
