"""Training detectors, as a task of a run."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tde_trainer.detection.detector import build_detector
from tde_trainer.detection.restore import evaluate_cell, reader_of, sweep_cell
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.sets import DetectionData, load_set, prepare_set
from tde_trainer.detection.train import train_detector
from tde_trainer.epochs import Cell, EpochDone, Started
from tde_trainer.errors import UserError
from tde_trainer.results import Result
from tde_trainer.task import Task


class DetectionTask(Task[DetectionConfig]):
    """See `Task`."""

    def fetch(self) -> None:
        """See `Task`."""
        prepare_set(self.config.data)

    def check(self, accelerator: Accelerator) -> Tensor:
        """See `Task`."""
        data = load_set(self.config.data)
        if not any(data.train.by_image.values()):
            raise UserError(f"{data.train.path} marks no object: there is nothing to learn from")
        if self.config.head.alpha is None and data.val is not None and not any(data.val.by_image.values()):
            raise UserError(f"{data.val.path} marks no object: no alpha can be chosen on it; set head.alpha")
        for method in self.config.methods:
            build_detector(self.config, method, data.class_counts, len(data.train.images))
        return data.class_counts

    def train(self, cell: Cell, accelerator: Accelerator, started: Started, epoch_done: EpochDone) -> dict[str, Any]:
        """See `Task`."""
        return train_detector(cell, self.config, accelerator, started, epoch_done)

    @cached_property
    def _data(self) -> DetectionData:
        return load_set(self.config.data)

    def evaluate(self, cell: Result, alpha: float | None) -> dict[str, Any]:
        """See `Task`."""
        return evaluate_cell(reader_of(cell, self.config, self._data), alpha)

    @property
    def alphas(self) -> list[float]:
        """See `Task`."""
        return sorted({0.0, *self.config.head.alphas})

    def sweep(self, cell: Result, alphas: list[float]) -> dict[str, dict[str, list[float]]]:
        """See `Task`."""
        return sweep_cell(reader_of(cell, self.config, self._data), alphas)

    def in_words(self, measured: dict[str, Any]) -> str:
        """See `Task`."""
        shown = measured["accuracy"]["with_tde"] or measured["accuracy"]["without_tde"]
        rare = "" if math.isnan(shown["AP_r"]) else f", AP_r {100 * shown['AP_r']:.1f}"
        return f"AP {100 * shown['AP']:.1f}{rare}"
