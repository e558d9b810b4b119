"""What a run trains: classifiers, detectors, or heads over many classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor

from tde_trainer.classification import ClassificationTask
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.task import DetectionTask
from tde_trainer.epochs import Cell
from tde_trainer.results import Result
from tde_trainer.scaling.schema import ScalingConfig
from tde_trainer.scaling.task import ScalingTask
from tde_trainer.schema import Config, RunConfig


class Task(Protocol):
    """All that a run needs to know of what it trains."""

    @property
    def data_name(self) -> str:
        """Of the images."""

    def fetch(self) -> None:
        """Bring the data here, where the recipe asks for it."""

    def check(self, accelerator: Accelerator) -> Tensor:
        """Whatever can be wrong with the recipe. Returns the number of training images of each class, ``[C]``.

        Raises:
            UserError: it can't be trained.
        """

    def epochs(self, method: str) -> int:
        """That a method is trained for."""

    def train(
        self,
        cell: Cell,
        accelerator: Accelerator,
        started: Callable[[int], None],
        epoch_done: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        """Train, or go on training, and evaluate: the measured part of the cell's results.json.

        Args:
            cell: what to train; a checkpoint in its directory is taken up.
            accelerator: device, precision and ranks.
            started: called with the number of epochs already done.
            epoch_done: called with each new line of metrics.jsonl, after that epoch is safe on disk.
        """

    def evaluate(self, cell: Result, alpha: float | None) -> dict[str, Any]:
        """The ``accuracy`` of a finished training's results.json, measured again from its checkpoint.

        Args:
            cell: the training.
            alpha: strength of TDE; None where the method has none.
        """

    @property
    def alphas(self) -> list[float]:
        """That a sweep looks at, in order."""

    def sweep(self, cell: Result, alphas: list[float]) -> dict[str, dict[str, list[float]]]:
        """A finished training read at each of ``alphas``: ``{"val": {measure: [A]}, "test": ...}``.

        Without validation images there is no ``val``.
        """

    def in_words(self, measured: dict[str, Any]) -> str:
        """The figures to print of a finished training."""


def task_of(config: RunConfig) -> Task:
    """The task that a config describes."""
    if isinstance(config, DetectionConfig):
        return DetectionTask(config)
    if isinstance(config, ScalingConfig):
        return ScalingTask(config)
    assert isinstance(config, Config)
    return ClassificationTask(config)
