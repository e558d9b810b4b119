"""What test_detection_ddp.py has torchrun start: `tde train` of detectors, on every rank, which keeps what it saw."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tde_trainer import run
from tde_trainer.app import app
from tde_trainer.detection import train
from tde_trainer.detection.reading import evaluate_detector
from tde_trainer.ranks import leave
from typer.testing import CliRunner

RECORD = "record{rank}.json"


def main(folder: Path) -> None:
    """Run the command of ``arguments.json``, and keep what came of it."""
    seen: dict[str, Any] = {}

    def evaluated(detector: Any, *others: Any) -> dict[str, Any]:
        seen["directions"] = [predictor.head.ema.tolist() for predictor in detector.roi_heads.predictors]
        seen["weights"] = [parameter.double().sum().item() for parameter in detector.parameters()]
        seen["measured"] = evaluate_detector(detector, *others)
        return seen["measured"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_detector", evaluated)
        patch.setattr(run, "write_report", lambda runs, path: {})  # it takes longer than all the rest
        result = CliRunner().invoke(app, json.loads((folder / "arguments.json").read_text()))
    record = {"exit_code": result.exit_code, "output": result.output, **seen}
    (folder / RECORD.format(rank=os.environ["RANK"])).write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
