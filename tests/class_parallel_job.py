"""What ``test_class_parallel.py`` starts on several ranks: every check of ``class_parallel_checks``.

``python -m torch.distributed.run --nproc-per-node P tests/class_parallel_job.py results.json`` writes for each check
what went wrong, by rank.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from class_parallel_checks.common import CHECKS, faults_of, rank, ranks
from class_parallel_checks.messages import killed
from torch import distributed as dist

NEEDS_FOUR = ("mesh",)


def main(results: Path, names: list[str]) -> None:
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=30))
    found: dict[str, dict[int, str]] = {}
    for name in names or checks_of(ranks()):
        told: list[Any] = [None] * ranks()
        began = time.monotonic()
        wrong = killed() if name == "killed" else faults_of(CHECKS[name])
        if name != "killed":  # there the group has lost a member
            dist.all_gather_object(told, wrong)
        found[name] = (
            {r: text for r, text in enumerate(told) if text} if name != "killed" else {0: wrong} if wrong else {}
        )
        if rank() == 0:
            print(f"{time.monotonic() - began:6.2f} s  {name}", flush=True)
            results.write_text(json.dumps(found))
    os._exit(0)  # nothing is to be ended in an orderly manner any more


def checks_of(size: int) -> list[str]:
    """The names of the checks that so many ranks can make; in the last one of them dies."""
    return [*(name for name in CHECKS if size >= 4 or name not in NEEDS_FOUR), "killed"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
