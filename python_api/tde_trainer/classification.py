"""Training classifiers, as a task of a run."""

from __future__ import annotations

import math
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tde_trainer.data import DATASETS
from tde_trainer.epochs import Cell, EpochDone, Started
from tde_trainer.evaluate import alpha_grid
from tde_trainer.methods import METHODS
from tde_trainer.network import build_network
from tde_trainer.restore import evaluate_cell, sweep_cell
from tde_trainer.results import Result
from tde_trainer.schema import Config
from tde_trainer.shares import check_lone_image, check_shares
from tde_trainer.stage_one import TrainedStage
from tde_trainer.task import Task
from tde_trainer.train import train_cell


class ClassificationTask(Task[Config]):
    """See `Task`."""

    def fetch(self) -> None:
        """See `Task`."""
        if self.config.data.download:
            DATASETS[self.config.data.name](self.config.data, self.config.seeds[0])

    def check(self, accelerator: Accelerator) -> Tensor:
        """See `Task`."""
        config = self.config
        data = DATASETS[config.data.name](config.data, config.seeds[0])
        check_shares(config.train.batch_size, len(data.train), accelerator.num_processes)
        for method in config.methods:
            network = build_network(config, method, data.channels, data.num_classes)
            if accelerator.num_processes == 1 and self.epochs(method):
                check_lone_image(network, data, config)
        for seed in config.seeds if config.stage_one else []:
            TrainedStage(config, seed, accelerator)
        return data.class_counts

    def epochs(self, method: str) -> int:
        """See `Task`."""
        return METHODS[method].schedule(self.config).epochs

    def train(self, cell: Cell, accelerator: Accelerator, started: Started, epoch_done: EpochDone) -> dict[str, Any]:
        """See `Task`."""
        return train_cell(cell, self.config, accelerator, started, epoch_done)

    def evaluate(self, cell: Result, alpha: float | None) -> dict[str, Any]:
        """See `Task`."""
        return evaluate_cell(cell, alpha)

    @property
    def alphas(self) -> list[float]:
        """See `Task`."""
        return alpha_grid(self.config.head)

    def sweep(self, cell: Result, alphas: list[float]) -> dict[str, dict[str, list[float]]]:
        """See `Task`."""
        return sweep_cell(cell, alphas)

    def in_words(self, measured: dict[str, Any]) -> str:
        """See `Task`."""
        shown = measured["accuracy"]["with_tde"] or measured["accuracy"]["without_tde"]
        few = "" if math.isnan(shown["few"]) else f", few {100 * shown['few']:.1f}"
        return f"overall {100 * shown['overall']:.1f}{few}"
