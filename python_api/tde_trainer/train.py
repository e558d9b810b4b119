"""Training one cell of classifiers: one method, one seed."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import RandomSampler

from tde_trainer.data import DATASETS, LongTailedData
from tde_trainer.device import describe
from tde_trainer.epochs import (
    Cell,
    EpochDone,
    Started,
    learning_rate,
    mean_loss,
    seed_epoch,
    taken_up,
    train_epochs,
)
from tde_trainer.evaluate import evaluate, extract
from tde_trainer.methods import Stage
from tde_trainer.network import Network, build_network
from tde_trainer.ranks import together
from tde_trainer.samplers import ClassSampler
from tde_trainer.schema import SEED_STRIDE, Config
from tde_trainer.shares import RankBatches, training_loader
from tde_trainer.stage_one import begin_second_stage


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
        loss_of_epoch = mean_loss(losses, epoch, accelerator)
        speed = len(self.data.train) / (time.perf_counter() - began)
        return {"loss": loss_of_epoch, "lr": rate, "images_per_second": speed}

    def _draw(self, count: int, power: float) -> tuple[Tensor, Tensor]:
        """See `methods.Draw`. On the CPU, where images and labels are."""
        each = self.data.class_counts.double() ** (power - 1)
        images, target = self.data.train[torch.multinomial(each[self.data.train.labels], count, replacement=True)]
        device = self.accelerator.device
        return self.data.pipeline(images.to(device), training=True), target.to(device)


def train_cell(
    cell: Cell,
    config: Config,
    accelerator: Accelerator,
    started: Started,
    epoch_done: EpochDone,
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
        # Also where a checkpoint takes the place of all that it sets: results.json says what was chosen.
        begun = begin_second_stage(network, config, cell.seed, accelerator)
        progress, rows = taken_up(cell, network, optimizer, accelerator)
        started(progress.epochs_done)

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
