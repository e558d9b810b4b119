"""What every data set gives the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tde_trainer.data.pipeline import Pipeline
from tde_trainer.errors import UserError

Batch = tuple[Tensor, Tensor]
UNREADABLE = -1  # the label of an image to be left out of an evaluation


class Images(Dataset[Batch], ABC):
    """Labelled images, all of one size, read by the batch: ``[B, channels, height, width]`` uint8 and ``[B]`` int64.

    Attributes:
        labels: ``[N]`` int64.
        channels: of an image.
        seed: what is random in a batch follows from this and the batch's indices.
        workers: processes that a data loader reads them with; 0: its own. Of no matter to what is read.
    """

    labels: Tensor
    channels: int
    seed: int = 0
    workers: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: Tensor) -> Batch:
        """The images and labels of ``index [B]`` int64."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """What a ``DataLoader`` calls for a batch, and passes on as it is."""
        return self[torch.as_tensor(indices)]

    def evaluated(self) -> Images:
        """The same images as an evaluation sees them: nothing is random."""
        return self


class ImageDataset(Images):
    """Images held in memory as bytes; a batch of any of them is one indexing operation.

    Args:
        images: ``[N, channels, height, width]`` uint8.
        labels: ``[N]`` int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.channels = images, labels, images.shape[1]

    def __getitem__(self, index: Tensor) -> Batch:
        return self.images[index], self.labels[index]


@dataclass(frozen=True)
class LongTailedData:
    """Disjoint splits: training is long-tailed, validation and test are balanced.

    Validation picks alpha and hyper-parameters; test is only ever reported.

    Raises:
        UserError: a class has no training image.
    """

    train: Images
    val: Images
    test: Images
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
        return self.train.channels

    @property
    def class_counts(self) -> Tensor:
        """Training images per class, ``[C]`` int64."""
        return torch.bincount(self.train.labels, minlength=self.num_classes)
