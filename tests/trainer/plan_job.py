"""What test_plan.py has torchrun start: steps of several heads, and what each rank sent and held."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from tde_trainer.plan.measure import measure
from tde_trainer.plan.model import Problem
from torch import distributed as dist


def main(folder: Path) -> None:
    """Measure the problems of ``problems.json``, keyword arguments each."""
    dist.init_process_group("gloo")
    measured = [asdict(measure(Problem(**problem))) for problem in json.loads((folder / "problems.json").read_text())]
    (folder / f"measured{os.environ['RANK']}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
