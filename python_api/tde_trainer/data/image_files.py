"""Images that stay on disk: decoded and cropped when they are asked for, by the workers of a data loader."""

from __future__ import annotations

import logging
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

from tde_trainer.data.base import UNREADABLE, Batch, Images
from tde_trainer.data.listing import Listing
from tde_trainer.errors import UserError

UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises at a damaged file
RESIZED = 256 / 224  # an evaluation's image over its crop
log = logging.getLogger(__name__)


def training_crop(size: int) -> Any:
    """Of a PIL image: a random part of 8% to all of it, of random shape, at ``size`` by ``size`` pixels."""
    return v2.Compose([v2.RandomResizedCrop(size), v2.PILToTensor()])


def evaluation_crop(size: int) -> Any:
    """Of a PIL image: its middle, once its shorter side has ``size * 256 / 224`` pixels."""
    return v2.Compose([v2.Resize(round(size * RESIZED)), v2.CenterCrop(size), v2.PILToTensor()])


class ImageFiles(Images):
    """The images of a list, in RGB.

    An image that cannot be read is left out, if that was asked for: in training another of its batch takes its place,
    with the label of its own, and in an evaluation its label is `UNREADABLE`. So batches keep their size.

    Args:
        root: folder that the list's paths are relative to.
        listing: paths and labels.
        size: of the crops, in pixels.
        skip_corrupt: leave out what cannot be read, with a warning.
        workers: see `Images`.
        training: crop at random.

    Raises:
        UserError: when a batch is read: an image cannot be, or in training none of a batch.
    """

    channels = 3

    def __init__(
        self, root: Path, listing: Listing, size: int, *, skip_corrupt: bool, workers: int, training: bool
    ) -> None:
        self.root, self.listing, self.labels = root, listing, torch.tensor(listing.labels)
        self.size, self.skip_corrupt, self.workers, self.training = size, skip_corrupt, workers, training
        self.crop = training_crop(size) if training else evaluation_crop(size)
        # Workers come and go with every epoch; in memory that they share, each image is warned of once.
        self.warned = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def evaluated(self) -> Images:
        """See `Images.evaluated`."""
        images = copy(self)
        images.training, images.crop = False, evaluation_crop(self.size)
        return images

    def __getitem__(self, index: Tensor) -> Batch:
        images = torch.zeros(len(index), 3, self.size, self.size, dtype=torch.uint8)
        readable = torch.zeros(len(index), dtype=torch.bool)
        # The crops' own random numbers: the same in whatever process, and no others change by them.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_batch_seed(self.seed, index))
            for place, i in enumerate(index.tolist()):
                image = self._read(i)
                if image is not None:
                    images[place], readable[place] = self.crop(image), True
        labels = self.labels[index]
        if not self.training:
            return images, labels.where(readable, UNREADABLE)
        if not readable.any():
            first = int(index[0])
            raise UserError(f"none of a batch's images could be read, as {self._path(first)}")
        chosen = torch.where(readable, torch.arange(len(index)), readable.int().argmax())
        return images[chosen], labels[chosen]

    def _path(self, i: int) -> str:
        return f"{self.root / self.listing.paths[i]} ({self.listing.place(i)})"

    def _read(self, i: int) -> Image.Image | None:
        try:
            image: Image.Image = pil_loader(self.root / self.listing.paths[i])
            return image
        except UNDECODABLE as error:
            why = getattr(error, "strerror", None) or error
            if not self.skip_corrupt:
                raise UserError(f"cannot read {self._path(i)}: {why}; data.skip_corrupt=true leaves it out") from error
            if not self.warned[i]:
                self.warned[i] = True
                log.warning("left out %s: %s", self._path(i), why)
            return None


def _batch_seed(seed: int, index: Tensor) -> int:
    # Of the batch, not of each image: a sampler may show an image many times an epoch, every time another crop of it.
    return int(np.random.SeedSequence([seed, *index.tolist()]).generate_state(1)[0])
