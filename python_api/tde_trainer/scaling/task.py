"""Training heads over many classes, as a task of a run."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tde_trainer.epochs import Cell, EpochDone, Started
from tde_trainer.errors import UserError
from tde_trainer.results import Result
from tde_trainer.scaling.schema import ScalingConfig
from tde_trainer.scaling.train import class_counts, train_scaling
from tde_trainer.task import Task


class ScalingTask(Task[ScalingConfig]):
    """See `Task`."""

    def check(self, accelerator: Accelerator) -> Tensor:
        """See `Task`."""
        ranks, data = accelerator.num_processes, self.config.data
        if data.test_samples % ranks:
            raise UserError(
                f"data.test_samples={data.test_samples} must be a multiple of the number of processes, {ranks}"
            )
        return class_counts(self.config, self.config.seeds[0])

    def train(self, cell: Cell, accelerator: Accelerator, started: Started, epoch_done: EpochDone) -> dict[str, Any]:
        """See `Task`."""
        return train_scaling(cell, self.config, accelerator, started, epoch_done)

    def evaluate(self, cell: Result, alpha: float | None) -> dict[str, Any]:
        """There is no checkpoint to evaluate.

        Raises:
            UserError: always.
        """
        raise UserError(f"{cell.directory}: a training over many classes keeps no checkpoint")

    @property
    def alphas(self) -> list[float]:
        """None is looked at."""
        return []

    def sweep(self, cell: Result, alphas: list[float]) -> dict[str, dict[str, list[float]]]:
        """See `evaluate`."""
        raise UserError(f"{cell.directory}: a training over many classes keeps no checkpoint")

    def in_words(self, measured: dict[str, Any]) -> str:
        """See `Task`."""
        losses, first = measured["losses"], measured["ranks"][0]  # the first process holds the most classes
        held, taken = (
            value / 1e6 for value in (first["weights"] + first["gradients"], first["peak"] - first["before"])
        )
        return (
            f"{measured['samples_per_second']:,.0f} samples/s, {measured['step_s']:.3f} s a step; the first process "
            f"holds {first['classes']:,} classes, {held:,.0f} MB of weights and gradients, took {taken:,.0f} MB more "
            f"than before; loss {losses[0]:.2f} to {losses[-1]:.2f}"
        )
