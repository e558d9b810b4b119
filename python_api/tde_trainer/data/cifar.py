"""CIFAR-10-LT and CIFAR-100-LT, as published: the exponential long tail of the training images.

The validation images are held out of the official test images, because the head class keeps all of its training
images; what is reported is the accuracy on the other test images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from tde_trainer.data.base import ImageDataset, LongTailedData
from tde_trainer.data.folder import folder_splits, resampled
from tde_trainer.data.longtail import long_tailed_counts, long_tailed_selection
from tde_trainer.data.pipeline import Pipeline
from tde_trainer.data.source import Source
from tde_trainer.errors import UserError
from tde_trainer.fetch import fetch_archive
from tde_trainer.schema import DataConfig

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
VAL_SEED = 0  # the same validation images for every seed: none of them is ever another seed's test image


@dataclass(frozen=True)
class Cifar:
    """One of the two."""

    dataset: type[CIFAR10]
    num_classes: int
    sha256: str  # of the archive

    def __call__(self, config: DataConfig, seed: int) -> LongTailedData:
        """The long-tailed training images, which ``config.subset_seed`` chooses; ``seed`` chooses nothing.

        Raises:
            UserError: the images are not there, unreadable, or not as many of each class as there should be.
        """
        train, test = self._splits(config)
        self._check(train, config)
        counts = long_tailed_counts(config.n_max, self.num_classes, config.ratio)
        if min(counts) < 1:
            raise UserError(f"data.n_max={config.n_max} and data.ratio={config.ratio:g} leave class counts {counts}")
        chosen = long_tailed_selection(train.labels, counts, config.subset_seed)
        val, test_images = test.held_out(config.val_per_class, VAL_SEED)
        pipeline = Pipeline(MEAN, STD, padding=config.image_size // 8, flip=True)
        return LongTailedData(train.read(chosen), val, test_images, train.class_names, pipeline)

    def _splits(self, config: DataConfig) -> tuple[Source, Source]:
        if config.format == "folder":
            return folder_splits(config)
        return self._published(config, train=True), self._published(config, train=False)

    def _published(self, config: DataConfig, train: bool) -> Source:
        folder = f"{config.root}/{self.dataset.base_folder}"
        try:
            # Its files are pickles: torchvision reads those that have the published check sums, and no others.
            found = self.dataset(config.root, train=train)
        except RuntimeError as error:
            if config.download:
                fetch_archive(self.dataset.url, self.sha256, Path(config.root))
                return self._published(replace(config, download=False), train)
            raise UserError(
                f"data.root={config.root}: no intact copy of {self.dataset.__name__} in {folder}; data.download=true "
                "fetches it, data.format=folder reads ROOT/train/CLASS/IMAGE and ROOT/test/CLASS/IMAGE instead"
            ) from error
        except OSError as error:
            raise UserError(f"cannot read {self.dataset.__name__} in {folder}: {error}") from error
        images, labels = torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets)

        def read(indices: Tensor) -> ImageDataset:
            return ImageDataset(resampled(images[indices], config.image_size), labels[indices])

        return Source(labels, tuple(found.classes), read)

    def _check(self, train: Source, config: DataConfig) -> None:
        counts = dict(zip(train.class_names, train.counts(), strict=True))
        if len(counts) != self.num_classes:
            raise UserError(
                f"data.root={config.root} holds {len(counts)} classes, wanted {self.num_classes}: "
                f"{', '.join(list(counts)[:3])}, ..."
            )
        wrong = {name: count for name, count in counts.items() if count != config.n_max}
        if wrong:
            name, count = next(iter(wrong.items()))
            raise UserError(
                f"data.root={config.root}: {len(wrong)} classes have not the {config.n_max} training images "
                f"(data.n_max) that the long tail is cut from; {name} has {count}"
            )


cifar10_lt = Cifar(CIFAR10, 10, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")
cifar100_lt = Cifar(CIFAR100, 100, "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7")
