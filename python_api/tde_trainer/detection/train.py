"""Training one cell of detectors: one method, one seed."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from tde_trainer.detection.detect import as_float
from tde_trainer.detection.detector import build_detector
from tde_trainer.detection.images import (
    DetectionImages,
    Example,
    RepeatFactorSampler,
    collate,
    repeat_factors,
)
from tde_trainer.detection.reading import evaluate_detector
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.sets import DetectionData, load_set
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
from tde_trainer.ranks import together
from tde_trainer.schema import SEED_STRIDE
from tde_trainer.shares import RankBatches


class DetectorTraining:
    """A detector, its optimizer and its images, on the accelerator's device and ranks."""

    def __init__(
        self,
        data: DetectionData,
        detector: nn.Module,
        optimizer: Optimizer,
        config: DetectionConfig,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.settings, self.accelerator, self.seed = config.train, accelerator, seed
        images = DetectionImages(data.train, data.root, training=True)
        self.sampler = RepeatFactorSampler(repeat_factors(data.train, config.train.repeat_threshold), seed)
        self.batches = RankBatches(
            self.sampler, config.train.batch_size, accelerator.process_index, accelerator.num_processes
        )
        loader: DataLoader[Example] = DataLoader(
            images, batch_sampler=self.batches, collate_fn=collate, num_workers=config.data.workers
        )
        self.loader = prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        self.model, self.optimizer = accelerator.prepare(detector, optimizer)

    def epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training images: its loss, last learning rate and speed."""
        settings, accelerator = self.settings, self.accelerator
        seed_epoch(self.seed, epoch, self.loader)
        self.sampler.set_epoch(epoch)
        self.model.train()
        began, losses, rate = time.perf_counter(), [], 0.0
        for step, (images, targets) in enumerate(self.loader):
            rate = learning_rate(epoch * len(self.loader) + step, len(self.loader), settings)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            parts: dict[str, Tensor] = self.model(as_float(images, accelerator.device), targets)
            loss = torch.stack(list(parts.values())).sum() * self.batches.weight(step)
            accelerator.backward(loss)
            self.optimizer.step()
            losses.append(loss.detach())
        loss_of_epoch = mean_loss(losses, epoch, accelerator)
        speed = len(self.sampler) / (time.perf_counter() - began)
        return {"loss": loss_of_epoch, "lr": rate, "images_per_second": speed}


def train_detector(
    cell: Cell,
    config: DetectionConfig,
    accelerator: Accelerator,
    started: Started,
    epoch_done: EpochDone,
) -> dict[str, Any]:
    """Train, or go on training, and evaluate; see `task.Task.train`."""
    set_seed(cell.seed * SEED_STRIDE)
    with together():
        data = load_set(config.data)
        detector = build_detector(config, cell.method, data.class_counts, len(data.train.images))
        settings = config.train
        optimizer = SGD(
            (parameter for parameter in detector.parameters() if parameter.requires_grad),
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        progress, rows = taken_up(cell, detector, optimizer, accelerator)
        started(progress.epochs_done)

    began = time.perf_counter() - progress.seconds
    training = DetectorTraining(data, detector, optimizer, config, accelerator, cell.seed)
    progress = train_epochs(cell, settings.epochs, training, progress, rows, accelerator, epoch_done)
    trained: GeneralizedRCNN = accelerator.unwrap_model(training.model)
    measured = evaluate_detector(trained, data, config, cell, accelerator)
    return {
        "class_names": list(data.class_names),
        "class_counts": data.class_counts.tolist(),
        **measured,
        "epochs": progress.epochs_done,
        "wall_time_s": time.perf_counter() - began,
        "device": describe(accelerator),
    }
