"""Training one cell: one method, one seed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import RandomSampler

from tde_trainer import checkpoint
from tde_trainer.checkpoint import Progress
from tde_trainer.data import DATASETS, LongTailedData
from tde_trainer.device import describe
from tde_trainer.errors import UserError
from tde_trainer.evaluate import evaluate, extract
from tde_trainer.files import dumps, write_atomic
from tde_trainer.methods import Stage
from tde_trainer.network import Network, build_network
from tde_trainer.ranks import process, together
from tde_trainer.samplers import ClassSampler
from tde_trainer.schema import Config, ScheduleConfig
from tde_trainer.shares import RankBatches, training_loader
from tde_trainer.stage_one import begin_second_stage

METRICS = "metrics.jsonl"
SEED_STRIDE = 1_000_003  # more than any number of epochs times ranks: no two seeds share random numbers


@dataclass(frozen=True)
class Cell:
    """One training of a run."""

    run: Path
    method: str
    seed: int

    @property
    def directory(self) -> Path:
        """Where its results, metrics and checkpoint go."""
        return self.run / self.method / f"seed{self.seed}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method} seed {self.seed}"


def learning_rate(step: int, steps_per_epoch: int, config: ScheduleConfig) -> float:
    """Linear warm-up to ``lr``, then cosine decay to zero at the last step, or a step down at every milestone."""
    warmup = min(config.warmup_epochs, config.epochs) * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
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


class Training:
    """A network, its optimizer and its data, on the accelerator's device and ranks."""

    def __init__(
        self,
        data: LongTailedData,
        network: Network,
        optimizer: SGD,
        config: Config,
        accelerator: Accelerator,
        seed: int,
    ):
        self.settings = settings = network.method.schedule(config)
        self.sampler = None
        if settings.sampler != "instance":
            self.sampler = ClassSampler(settings.sampler, data.train.labels, seed, settings.epochs)
        self.batches = RankBatches(
            self.sampler or RandomSampler(data.train),
            settings.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.loader = training_loader(data.train, self.batches, accelerator)
        if settings.sync_batchnorm:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if settings.channels_last:
            network.backbone.to(memory_format=torch.channels_last)
        if settings.compile:
            network.backbone.compile()
        self.model, self.optimizer = accelerator.prepare(network, optimizer)
        self.data, self.config, self.accelerator, self.seed = data, config, accelerator, seed
        self.method = network.method
        self.class_counts = data.class_counts.to(accelerator.device)

    def epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training images: its loss, last learning rate and speed."""
        settings, accelerator = self.settings, self.accelerator
        seed_epoch(self.seed, epoch, self.loader)
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)
        stage = Stage(self.class_counts, epoch / settings.epochs, self.config.loss)
        self.model.train()
        began, losses, rate = time.perf_counter(), [], 0.0
        for step, (images, target) in enumerate(self.loader):
            rate = learning_rate(epoch * len(self.loader) + step, len(self.loader), settings)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["lr_factor"]
            augmented = self.data.pipeline(images, training=True)
            batch = self.method.compose(augmented, target, stage, partial(self._draw, len(target)))
            self.optimizer.zero_grad()
            loss: Tensor = self.model(batch, stage) * self.batches.weight(step)
            accelerator.backward(loss)
            self.optimizer.step()
            losses.append(loss.detach())
        mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        with together():
            if not math.isfinite(mean_loss):
                raise UserError(f"the loss is {mean_loss} in epoch {epoch + 1}; a lower train.lr may help")
        speed = len(self.data.train) / (time.perf_counter() - began)
        return {"loss": mean_loss, "lr": rate, "images_per_second": speed}

    def _draw(self, count: int, power: float) -> tuple[Tensor, Tensor]:
        """See `methods.Draw`. On the CPU, where images and labels are."""
        each = self.data.class_counts.double() ** (power - 1)
        images, target = self.data.train[torch.multinomial(each[self.data.train.labels], count, replacement=True)]
        device = self.accelerator.device
        return self.data.pipeline(images.to(device), training=True), target.to(device)


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
    progress = checkpoint.load(cell.directory, network, optimizer, accelerator.scaler)
    return progress, _rows(cell.directory / METRICS, progress.epochs_done)


def train_epochs(
    cell: Cell,
    epochs: int,
    training: Trainable,
    progress: Progress,
    rows: list[dict[str, Any]],
    accelerator: Accelerator,
    epoch_done: Callable[[dict[str, Any]], None],
) -> Progress:
    """Train from where it stands, a checkpoint after every epoch; ``rows`` gets a line for each."""
    began = time.perf_counter() - progress.seconds

    @together()
    def save() -> None:
        if accelerator.is_main_process:
            # Metrics first: lines without a checkpoint are dropped on resumption, the reverse would be a gap.
            write_atomic(cell.directory / METRICS, "".join(dumps(row) + "\n" for row in rows))
            trained = accelerator.unwrap_model(training.model)
            checkpoint.save(cell.directory, trained, training.optimizer, progress, accelerator.scaler)

    if not epochs:
        save()
    for epoch in range(progress.epochs_done, epochs):
        rows.append({"epoch": epoch + 1, **training.epoch(epoch)})
        progress = Progress(cell.seed, epoch + 1, time.perf_counter() - began)
        save()
        epoch_done(rows[-1])
    return progress


def train_cell(
    cell: Cell,
    config: Config,
    accelerator: Accelerator,
    started: Callable[[int], None],
    epoch_done: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train, or go on training, and evaluate.

    Args:
        cell: what to train; a checkpoint in its directory is taken up.
        config: the run's recipe.
        accelerator: device, precision and ranks.
        started: called with the number of epochs already done.
        epoch_done: called with each new line of metrics.jsonl, after that epoch is safe on disk.

    Returns:
        The measured part of the cell's results.json.
    """
    set_seed(cell.seed * SEED_STRIDE)
    with together():
        data = DATASETS[config.data.name](config.data, cell.seed)
        network = build_network(config, cell.method, data.channels, data.num_classes)
        settings = network.method.schedule(config)
        optimizer = SGD(
            network.parameter_groups(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        progress, rows = taken_up(cell, network, optimizer, accelerator)
        started(progress.epochs_done)
        # A second stage without training follows from the first in one go.
        begun = {} if progress.epochs_done else begin_second_stage(network, config, cell.seed, accelerator)

    training = Training(data, network, optimizer, config, accelerator, cell.seed)
    began = time.perf_counter() - progress.seconds
    progress = train_epochs(cell, settings.epochs, training, progress, rows, accelerator, epoch_done)
    val, test = (
        extract(training.model, split, data.pipeline, settings.batch_size, accelerator)
        for split in (data.val, data.test)
    )
    trained: Network = accelerator.unwrap_model(training.model)
    results = evaluate(trained, val, test, data.class_counts.to(val.y.device), config.head)
    return {
        "class_names": list(data.class_names),
        "class_counts": data.class_counts.tolist(),
        **results,
        "stage_two": begun,
        "epochs": progress.epochs_done,
        "wall_time_s": time.perf_counter() - began,
        "device": describe(accelerator),
    }


def _rows(path: Path, epochs_done: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that the checkpoint vouches for."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines[:epochs_done]]
