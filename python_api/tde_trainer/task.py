"""The interface of what a run trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from accelerate import Accelerator
from torch import Tensor

from tde_trainer.epochs import Cell, EpochDone, Started
from tde_trainer.results import Result
from tde_trainer.schema import RunConfig

Recipe = TypeVar("Recipe", bound=RunConfig)


class Task(ABC, Generic[Recipe]):
    """All that a run needs to know of what it trains.

    Args:
        config: the recipe.
        data_name: of its images.
    """

    def __init__(self, config: Recipe, data_name: str) -> None:
        self.config, self.data_name = config, data_name

    def fetch(self) -> None:
        """Bring the data here, where the recipe asks for it; most have nothing to fetch."""

    @abstractmethod
    def check(self, accelerator: Accelerator) -> Tensor:
        """Whatever can be wrong with the recipe. Returns the number of training images of each class, ``[C]``.

        Raises:
            UserError: it can't be trained.
        """

    def epochs(self, method: str) -> int:
        """That a method is trained for."""
        return self.config.train.epochs

    @abstractmethod
    def train(self, cell: Cell, accelerator: Accelerator, started: Started, epoch_done: EpochDone) -> dict[str, Any]:
        """Train, or go on training, and evaluate: the measured part of the cell's results.json.

        Args:
            cell: what to train; a checkpoint in its directory is taken up.
            accelerator: device, precision and ranks.
            started, epoch_done: called as it goes.
        """

    @abstractmethod
    def evaluate(self, cell: Result, alpha: float | None) -> dict[str, Any]:
        """The ``accuracy`` of a finished training's results.json, measured again from its checkpoint.

        Args:
            cell: the training.
            alpha: strength of TDE; None where the method has none.
        """

    @property
    @abstractmethod
    def alphas(self) -> list[float]:
        """That a sweep looks at, in order."""

    @abstractmethod
    def sweep(self, cell: Result, alphas: list[float]) -> dict[str, dict[str, list[float]]]:
        """A finished training read at each of ``alphas``: ``{"val": {measure: [A]}, "test": ...}``.

        Without validation images there is no ``val``.
        """

    @abstractmethod
    def in_words(self, measured: dict[str, Any]) -> str:
        """The figures to print of a finished training."""
