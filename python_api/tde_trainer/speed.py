"""How fast a recipe's network trains, and what of a step the head takes: on synthetic images, in place of any data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.optim import SGD

from tde_kernels import FusedTDEHead
from tde_trainer.device import cpu_threads, describe, make_accelerator
from tde_trainer.methods import Batch, Stage
from tde_trainer.network import build_network
from tde_trainer.schema import Config

CHANNELS = 3
WARM_UP = 2


@dataclass(frozen=True)
class Speed:
    """Medians over steps."""

    method: str
    model: str
    precision: str
    batch_size: int
    image_size: int
    num_classes: int
    device: str
    step_ms: float  # images to updated weights
    head_ms: float  # the head's loss and its backward, of features that are there

    @property
    def images_per_second(self) -> float:
        """In training."""
        return self.batch_size / self.step_ms * 1000

    @property
    def head_share(self) -> float:
        """Of a step, 0 .. 1."""
        return self.head_ms / self.step_ms

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        derived = {"images_per_second": self.images_per_second, "head_share": self.head_share}
        return {"images": "synthetic", **asdict(self), **derived}


def measure_speed(config: Config, num_classes: int, steps: int) -> Speed:
    """Train the first method of ``config`` on random images of ``data.image_size`` for ``steps`` steps.

    Args:
        config: a recipe; its data are not read.
        num_classes: C.
        steps: of each measurement, after `WARM_UP` others.
    """
    settings, size = config.train, config.data.image_size
    accelerator = make_accelerator(config.precision)
    network = build_network(config, config.methods[0], CHANNELS, num_classes)
    if settings.channels_last:
        network.backbone.to(memory_format=torch.channels_last)
    if settings.compile:
        network.backbone.compile()
    model, optimizer = accelerator.prepare(network.train(), SGD(network.parameter_groups(), 1e-3, momentum=0.9))
    device = accelerator.device
    images = torch.randn(settings.batch_size, CHANNELS, size, size, device=device)
    target = torch.randint(num_classes, (settings.batch_size,), device=device)
    stage = Stage(torch.ones(num_classes, dtype=torch.int64, device=device), 0.0, config.loss)
    head: FusedTDEHead = network.head

    def step() -> None:
        optimizer.zero_grad()
        accelerator.backward(model(Batch(images, target), stage))
        optimizer.step()

    with cpu_threads(settings.threads):
        whole = _median_ms(step, steps, device, "training steps")
        with torch.no_grad(), accelerator.autocast():
            features = network.backbone(images)
        features = features.detach().requires_grad_()

        def head_alone() -> None:
            with accelerator.autocast():
                loss: Tensor = network.method.loss(network.neck, head, features, Batch(images, target), stage)
            loss.backward()

        alone = _median_ms(head_alone, steps, device, "the head alone")
        described = describe(accelerator)
    return Speed(
        config.methods[0],
        config.model.name,
        config.precision,
        settings.batch_size,
        size,
        num_classes,
        described,
        whole,
        alone,
    )


def _median_ms(work: Callable[[], None], steps: int, device: torch.device, what: str) -> float:
    times = []
    for _ in track(range(WARM_UP + steps), what, transient=True):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[WARM_UP:])
