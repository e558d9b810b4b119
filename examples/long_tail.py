"""What the examples share: long-tailed digits, a small network, its training, and a table over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean, stdev
from typing import NamedTuple

import torch
from tde_trainer.data import Images, digits_lt
from tde_trainer.metrics import GROUPS, group_accuracy, per_class_accuracy
from tde_trainer.schema import DataConfig
from torch import Tensor, nn
from torch.nn.functional import interpolate


class Split(NamedTuple):
    """Images ``[N, channels, size, size]`` in 0 .. 1, and labels ``[N]``."""

    images: Tensor
    labels: Tensor


class Digits(NamedTuple):
    """Long-tailed for training, balanced for validation and test."""

    train: Split
    val: Split
    test: Split
    counts: Tensor  # [10] training images of each class


def digits(seed: int = 0, size: int = 8, channels: int = 1) -> Digits:
    """scikit-learn's 1,797 handwritten digits: 114 training images of the 0 down to 2 of the 9."""
    data = digits_lt(DataConfig(ratio=50, val_per_class=20, test_per_class=40), seed)

    def split(part: Images) -> Split:
        images, labels = part[torch.arange(len(part))]
        enlarged = interpolate(images / 16, size=(size, size), mode="bilinear")
        return Split(enlarged.expand(-1, channels, -1, -1), labels)

    return Digits(split(data.train), split(data.val), split(data.test), data.train.labels.bincount())


def small_network() -> nn.Module:
    """Images ``[B, 1, 8, 8]`` to 64 features."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
    )


def train(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor],
    split: Split,
    epochs: int,
    lr: float = 0.1,
) -> None:
    """Stochastic gradient descent with momentum, a cosine from ``lr`` to 0, and batches of 64."""
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(split.labels)).split(64):
            optimizer.zero_grad()
            loss(split.images[batch], split.labels[batch]).backward()
            optimizer.step()
        schedule.step()


class Table:
    """Test accuracy over the classes with many, medium and few training images; a row's mean over its seeds."""

    def __init__(self) -> None:
        self.rows: dict[str, list[list[float]]] = {}

    def add(self, name: str, predicted: Tensor, labels: Tensor, counts: Tensor) -> None:
        """Takes in one seed's predictions ``[N]`` for test images of these ``labels``; ``counts [C]`` in training."""
        groups = group_accuracy(per_class_accuracy(predicted, labels, len(counts)), counts)
        self.rows.setdefault(name, []).append([100 * groups[group] for group in GROUPS])

    def show(self) -> None:
        """Prints all rows."""
        print(f"{'test accuracy in %':<24}" + "".join(f"{group:>16}" for group in GROUPS))
        for name, seeds in self.rows.items():
            groups = [
                (mean(group), f" ± {stdev(group):4.1f}" if group[1:] else "") for group in zip(*seeds, strict=True)
            ]
            print(f"{name:<24}" + "".join(f"{f'{value:.1f}{spread}':>16}" for value, spread in groups))
