"""Training a head over many classes, and what that took."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.optim import SGD

from tde_kernels import ClassParallelTDEHead
from tde_trainer.data.longtail import shot_masks
from tde_trainer.device import describe
from tde_trainer.epochs import METRICS, Cell, EpochDone, Started, learning_rate
from tde_trainer.errors import UserError
from tde_trainer.files import dumps, write_atomic
from tde_trainer.ranks import together
from tde_trainer.scaling.data import samples, zipf_labels
from tde_trainer.scaling.network import build_backbone, build_head
from tde_trainer.scaling.schema import ScalingConfig
from tde_trainer.schema import SEED_STRIDE

TRAIN, TEST = 0, 1  # seeds of labels, each in a stride of its own


def class_counts(config: ScalingConfig, seed: int) -> Tensor:
    """Training samples of each class, ``[C]``."""
    labels = zipf_labels(config.data.train_samples, config.data.classes, seed * SEED_STRIDE + TRAIN)
    return torch.bincount(labels, minlength=config.data.classes)


def train_scaling(
    cell: Cell,
    config: ScalingConfig,
    accelerator: Accelerator,
    started: Started,
    epoch_done: EpochDone,
) -> dict[str, Any]:
    """Train from the beginning, and evaluate; see `task.Task.train`. There are no checkpoints on the way."""
    set_seed(cell.seed * SEED_STRIDE)
    started(0)
    began, settings = time.perf_counter(), config.train
    before = _begin_peak(accelerator)
    backbone = build_backbone(config)
    head = build_head(config, cell.method, cell.seed, accelerator.device)
    parameters = [*backbone.parameters(), *head.parameters()]
    backbone, optimizer = accelerator.prepare(
        backbone, SGD(parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    )
    labels = zipf_labels(config.data.train_samples, config.data.classes, cell.seed * SEED_STRIDE + TRAIN)
    steps = len(labels) // settings.batch_size
    rows: list[dict[str, Any]] = []
    seconds: list[float] = []
    for epoch in range(settings.epochs):
        losses = []
        for number, batch in enumerate(labels.chunk(steps)):
            step, began_step = epoch * steps + number, time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, settings)
            x, target = _own(config, batch, cell.seed * SEED_STRIDE + step, accelerator)
            optimizer.zero_grad()
            loss = head.loss(backbone(x), target)
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began_step)
        if not math.isfinite(losses[-1]):  # alike on all processes
            raise UserError(f"the loss is {losses[-1]} in epoch {epoch + 1}; a lower train.lr may help")
        speed = settings.batch_size / statistics.median(seconds[-steps:])
        rows.append(
            {"epoch": epoch + 1, "loss": statistics.fmean(losses), "losses": losses, "images_per_second": speed}
        )
        with together():
            if accelerator.is_main_process:
                write_atomic(cell.directory / METRICS, "".join(dumps(row) + "\n" for row in rows))
        epoch_done(rows[-1])
    counts = class_counts(config, cell.seed)
    step_seconds = statistics.median(seconds)
    return {
        "class_counts": counts.tolist(),
        "accuracy": {
            "without_tde": _accuracy(backbone, head, config, counts, cell.seed, accelerator),
            "with_tde": None,
        },
        "alpha": None,
        "losses": [loss for row in rows for loss in row["losses"]],
        "step_s": step_seconds,
        "samples_per_second": settings.batch_size / step_seconds,
        "ranks": gather_object([{**_held(head), "before": before, "peak": _peak(accelerator)}]),
        "epochs": settings.epochs,
        "wall_time_s": time.perf_counter() - began,
        "device": describe(accelerator),
    }


def _own(config: ScalingConfig, labels: Tensor, seed: int, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """This process's part of the samples of a batch of all, and their labels."""
    x = samples(labels, config.data.channels, config.data.noise, seed)
    own = (part.tensor_split(accelerator.num_processes)[accelerator.process_index] for part in (x, labels))
    x, labels = (part.to(accelerator.device) for part in own)
    return x, labels


@torch.no_grad()
def _accuracy(
    backbone: nn.Module,
    head: ClassParallelTDEHead,
    config: ScalingConfig,
    counts: Tensor,
    seed: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Of test samples, drawn as the training samples are, by how often their classes are trained on."""
    everything = zipf_labels(config.data.test_samples, config.data.classes, seed * SEED_STRIDE + TEST)
    x, _ = _own(config, everything, seed * SEED_STRIDE - 1, accelerator)
    _, classes = head.eval().predict(backbone(x), topk=1, alpha=0.0)
    right = accelerator.gather(classes[:, 0]).cpu() == everything
    of_shots = {name: right[mask[everything]] for name, mask in shot_masks(counts).items()}
    return {name: hits.double().mean().item() for name, hits in {**of_shots, "top1": right}.items()}


def _held(head: ClassParallelTDEHead) -> dict[str, int]:
    """What this process holds of the head, in bytes."""
    gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    return {
        "classes": len(head.weight),
        "weights": sum(parameter.nbytes for parameter in head.parameters()),
        "gradients": sum(gradient.nbytes for gradient in gradients),
    }


def _begin_peak(accelerator: Accelerator) -> int:
    """Forget the most memory that this process has taken; what it takes now, in bytes."""
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
        return torch.cuda.memory_allocated(accelerator.device)
    with suppress(OSError):  # where it is forbidden the peak is that of the process
        Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(accelerator: Accelerator) -> int:
    """The most memory since, in bytes."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    return _resident("VmHWM")


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))
