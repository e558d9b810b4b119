"""What every data set gives the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images held in memory, with an optional per-sample transform.

    Args:
        images: ``[N, channels, height, width]`` float.
        labels: ``[N]`` int64.
        transform: applied to one image each time it is read.
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.labels[index]


@dataclass(frozen=True)
class LongTailedData:
    """Disjoint splits: training is long-tailed, validation and test are balanced.

    Validation picks alpha and hyper-parameters; test is only ever reported.
    """

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    @property
    def class_counts(self) -> Tensor:
        """Training images per class, ``[C]`` int64."""
        return torch.bincount(self.train.labels, minlength=self.num_classes)
