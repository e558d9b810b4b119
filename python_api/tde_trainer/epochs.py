"""What all trainings have in common: cells, the learning rate, seeds, and epochs that survive an interruption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import Optimizer

from tde_trainer import checkpoint
from tde_trainer.checkpoint import Progress
from tde_trainer.config import origin
from tde_trainer.errors import UserError
from tde_trainer.files import dumps, write_atomic
from tde_trainer.ranks import process, together
from tde_trainer.schema import SEED_STRIDE, RunConfig, ScheduleConfig

METRICS = "metrics.jsonl"
Started = Callable[[int], None]  # told the number of epochs already done
EpochDone = Callable[[dict[str, Any]], None]  # told each new line of metrics.jsonl, once that epoch is safe on disk


@dataclass(frozen=True)
class Cell:
    """One training of a run."""

    run: Path
    method: str
    seed: int
    config: RunConfig

    @property
    def directory(self) -> Path:
        """Where its results, metrics and checkpoint go."""
        return self.run / self.method / f"seed{self.seed}"

    @property
    def origin(self) -> dict[str, Any]:
        """What its checkpoint says that it is of."""
        return origin(self.config, self.method, self.seed)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method} seed {self.seed}"


def learning_rate(step: int, steps_per_epoch: int, config: ScheduleConfig) -> float:
    """Linear warm-up to ``lr``, then cosine decay to zero at the last step, or a step down at every milestone."""
    warmup = min(config.warmup_epochs, config.epochs) * steps_per_epoch
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    total = config.epochs * steps_per_epoch
    if config.decay == "steps":
        return config.lr * config.step_factor ** sum(step >= share * total for share in config.milestones)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def seed_epoch(seed: int, epoch: int, loader: Any) -> None:
    """Make the epoch's shuffling depend on nothing but seed and epoch, whatever else is drawn also on the rank.

    A resumed training thus repeats the epoch in hand bit for bit, with no random state kept.
    """
    loader.set_epoch(epoch)
    # `device_specific` adds the rank: no two pairs of epoch and rank share random numbers either.
    set_seed(seed * SEED_STRIDE + epoch * process().num_processes, device_specific=True)
    loader.dataset.seed = torch.initial_seed()


def mean_loss(losses: list[Tensor], epoch: int, accelerator: Accelerator) -> float:
    """Of an epoch's steps, over all ranks.

    Raises:
        UserError: it is not finite.
    """
    mean: float = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
    with together():
        if not math.isfinite(mean):
            raise UserError(f"the loss is {mean} in epoch {epoch + 1}; a lower train.lr may help")
    return mean


class Trainable(Protocol):
    """What `train_epochs` trains."""

    model: nn.Module  # on the accelerator's device and ranks
    optimizer: Optimizer

    def epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training images, and what metrics.jsonl is to say of it."""


def taken_up(
    cell: Cell, network: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> tuple[Progress, list[dict[str, Any]]]:
    """How far a training has come: its checkpoint, loaded, and the lines of metrics.jsonl."""
    if not (cell.directory / checkpoint.FILE).exists():
        return Progress(cell.seed), []
    progress = checkpoint.load(cell.directory, network, optimizer, accelerator.scaler, cell.origin)
    return progress, _rows(cell.directory / METRICS, progress.epochs_done)


def train_epochs(
    cell: Cell,
    epochs: int,
    training: Trainable,
    progress: Progress,
    rows: list[dict[str, Any]],
    accelerator: Accelerator,
    epoch_done: EpochDone,
) -> Progress:
    """Train from where it stands, a checkpoint after every epoch; ``rows`` gets a line for each."""
    began = time.perf_counter() - progress.seconds

    @together()
    def save() -> None:
        if accelerator.is_main_process:
            # Metrics first: lines without a checkpoint are dropped on resumption, the reverse would be a gap.
            write_atomic(cell.directory / METRICS, "".join(dumps(row) + "\n" for row in rows))
            trained = accelerator.unwrap_model(training.model)
            checkpoint.save(cell.directory, trained, training.optimizer, progress, accelerator.scaler, cell.origin)

    if not epochs:
        save()
    for epoch in range(progress.epochs_done, epochs):
        rows.append({"epoch": epoch + 1, **training.epoch(epoch)})
        progress = Progress(cell.seed, epoch + 1, time.perf_counter() - began)
        save()
        epoch_done(rows[-1])
    return progress


def _rows(path: Path, epochs_done: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that the checkpoint vouches for.

    Raises:
        UserError: they are not all there.
    """
    try:
        lines = path.read_bytes().splitlines()[:epochs_done]
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(rows) < epochs_done:
        raise UserError(f"{path} has {len(rows)} lines, while the checkpoint beside it is of {epochs_done} epochs")
    return rows
