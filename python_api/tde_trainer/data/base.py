"""What every data set gives the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tde_trainer.data.pipeline import Pipeline
from tde_trainer.errors import UserError

Batch = tuple[Tensor, Tensor]


class ImageDataset(Dataset[Batch]):
    """Images held in memory as bytes; a batch of any of them is one indexing operation.

    Args:
        images: ``[N, channels, height, width]`` uint8.
        labels: ``[N]`` int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Tensor) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The images and labels of a batch: what a ``DataLoader`` calls, and passes on with `collated`."""
        return self[torch.as_tensor(indices)]


def collated(batch: Any) -> Any:
    """A batch of `ImageDataset` is one already."""
    return batch


@dataclass(frozen=True)
class LongTailedData:
    """Disjoint splits: training is long-tailed, validation and test are balanced.

    Validation picks alpha and hyper-parameters; test is only ever reported.

    Raises:
        UserError: a class has no training image.
    """

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset
    class_names: tuple[str, ...]
    pipeline: Pipeline

    def __post_init__(self) -> None:
        empty = [name for name, count in zip(self.class_names, self.class_counts.tolist(), strict=True) if not count]
        if empty:
            raise UserError(f"every class needs at least one training image; {empty[0]} has none")

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.train.images.shape[1]

    @property
    def class_counts(self) -> Tensor:
        """Training images per class, ``[C]`` int64."""
        return torch.bincount(self.train.labels, minlength=self.num_classes)
