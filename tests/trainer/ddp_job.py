"""What test_ddp.py has torchrun start: commands of `tde`, on every rank, each of which writes down what it saw.

Networks here have no batch norm and images no augmentation, so that the number of processes changes nothing but the
order of summation.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tde_trainer import run, train
from tde_trainer.app import app
from tde_trainer.data import DATASETS, LongTailedData
from tde_trainer.data.digits_lt import digits_lt
from tde_trainer.evaluate import Features, evaluate
from tde_trainer.files import write_atomic
from tde_trainer.models import MODELS, Backbone
from tde_trainer.network import Network
from tde_trainer.ranks import leave
from tde_trainer.schema import DataConfig, ModelConfig
from tde_trainer.train import Training
from torch import Tensor, nn
from typer.testing import CliRunner

RECORD = "record{rank}.json"
REPORTED = "two"  # a job's name: its run gets a report
KILLED = "killed"  # a job's name: its second rank is killed in the second epoch


def plain(config: ModelConfig, channels: int) -> Backbone:
    """A layer without batch norm."""
    return Backbone(nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, config.features), nn.ReLU()), config.features)


def plain_digits(config: DataConfig, seed: int) -> LongTailedData:
    """Digits that are not shifted."""
    data = digits_lt(config, seed)
    return replace(data, pipeline=replace(data.pipeline, padding=0))


class Recorder:
    """What this process sees while it trains.

    Args:
        report: whether runs get one; plots take longer than all the rest.

    Attributes:
        seen: for every method: the EMA after each epoch; the classes drawn by the method, batch by batch; of the test
            images the classes, in the order of evaluation, the features and the predictions.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, report: bool = False) -> None:
        self.seen: dict[str, dict[str, Any]] = {}
        self._method, self._epoch, self._draw = "", Training.epoch, Training._draw
        patch.setitem(MODELS, "plain", plain)
        patch.setitem(DATASETS, "plain_digits", plain_digits)
        patch.setattr(Training, "epoch", lambda training, epoch: self.epoch(training, epoch))
        patch.setattr(Training, "_draw", lambda training, count, power: self.draw(training, count, power))
        patch.setattr(train, "evaluate", self.evaluate)
        if not report:
            patch.setattr(run, "write_report", lambda runs, path: {})
        self.before_epoch: Callable[[int], None] = lambda epoch: None

    def epoch(self, training: Training, epoch: int) -> dict[str, Any]:
        """See `Training.epoch`."""
        self.before_epoch(epoch)
        network: Network = training.accelerator.unwrap_model(training.model)
        self._method = type(network.method).__name__
        row = self._epoch(training, epoch)
        self._of_method("ema").append(network.head.ema.tolist())
        return row

    def draw(self, training: Training, count: int, power: float) -> tuple[Tensor, Tensor]:
        """See `Training._draw`."""
        images, target = self._draw(training, count, power)
        self._of_method("drawn").append(target.tolist())
        return images, target

    def evaluate(self, network: Network, val: Features, test: Features, *others: Any) -> dict[str, Any]:
        """See `evaluate.evaluate`."""
        values = evaluate(network, val, test, *others)
        self._of_method("classes").append(test.y.tolist())
        self._of_method("features").append(test.x.tolist())
        self._of_method("predicted").append(network.head(test.x, alpha=0.0).argmax(-1).tolist())
        return values

    def _of_method(self, what: str) -> list[Any]:
        kept: list[Any] = self.seen.setdefault(self._method, {}).setdefault(what, [])
        return kept


def main(folder: Path) -> None:
    """Run the commands of ``jobs.json``, ``{name: arguments}``, and keep what came of each."""
    rank = int(os.environ["RANK"])
    records = {}
    for name, arguments in json.loads((folder / "jobs.json").read_text()).items():
        with pytest.MonkeyPatch.context() as patch:
            recorder = Recorder(patch, report=name == REPORTED)
            if name == KILLED and rank == 1:
                recorder.before_epoch = lambda epoch: _die(folder) if epoch else None
            result = CliRunner().invoke(app, arguments)
        records[name] = {"exit_code": result.exit_code, "output": result.output, "seen": recorder.seen}
        write_atomic(folder / RECORD.format(rank=rank), json.dumps(records))  # may be killed while it writes


def _die(folder: Path) -> None:
    (folder / KILLED).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
