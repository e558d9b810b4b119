"""Images with their boxes and masks, as torchvision's detectors take them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from numpy.random import default_rng
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import pil_loader
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import horizontal_flip, pil_to_tensor

from tde_trainer.data.image_files import UNDECODABLE
from tde_trainer.detection.annotations import Annotations, trainable
from tde_trainer.detection.masks import masks
from tde_trainer.errors import UserError

EPOCHS_APART = 1_000_003  # more than any number of epochs: no two seeds share random numbers
Target = dict[str, Tensor]
Example = tuple[Tensor, Target]


class DetectionImages(Dataset[Example]):
    """The images of an annotation file.

    An item is an image ``[3, H, W]`` uint8 and its target: ``boxes [n, 4]`` float32 (x1, y1, x2, y2 in pixels),
    ``labels [n]`` int64 in 1 .. C, ``masks [n, H, W]`` uint8, of the objects that can be learned from; n may be 0.

    Args:
        annotations: of the images.
        root: folder that their file names start at.
        training: mirrors every other image, by a draw that follows from ``seed`` and the image's index.
    """

    def __init__(self, annotations: Annotations, root: Path, *, training: bool) -> None:
        self.annotations, self.root, self.training, self.seed = annotations, root, training, 0

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int) -> Example:
        entry = self.annotations.images[index]
        path = self.root / entry.file_name
        image = _read(path)
        if image.shape[1:] != (entry.height, entry.width):
            size = f"{image.shape[2]} x {image.shape[1]}"
            raise UserError(
                f"{path} is {size}; its annotations, in {self.annotations.path}, are of {entry.width} x {entry.height}"
            )
        objects = [found for found in self.annotations.by_image[entry.id] if trainable(found)]
        boxes = torch.tensor([found.bbox for found in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = box_convert(boxes, "xywh", "xyxy")
        labels = torch.tensor([self.annotations.labels[found.category_id] for found in objects], dtype=torch.int64)
        try:
            mask = masks(objects, entry.height, entry.width)
        except ValueError as error:
            raise UserError(f"{self.annotations.path}: {error}") from error
        if self.training and default_rng([self.seed, index]).random() < 0.5:
            image, mask = horizontal_flip(image), horizontal_flip(mask)
            boxes[:, [0, 2]] = entry.width - boxes[:, [2, 0]]
        return image, {"boxes": boxes, "labels": labels, "masks": mask}


def _read(path: Path) -> Tensor:
    try:
        image: Tensor = pil_to_tensor(pil_loader(path))
    except UNDECODABLE as error:
        raise UserError(f"cannot read image {path}: {getattr(error, 'strerror', None) or error}") from error
    return image


def collate(examples: list[Example]) -> tuple[list[Tensor], list[Target]]:
    """Images and targets of a batch, in lists, as they differ in size."""
    images, targets = zip(*examples, strict=True)
    return list(images), list(targets)


def repeat_factors(annotations: Annotations, threshold: float) -> Tensor:
    """How often an epoch shows each image on average, ``[N]`` float64 from 1 up.

    ``max_c max(1, sqrt(threshold / f_c))`` over the classes c that an image shows, of which ``f_c`` is the share of
    images that show them.
    """
    share = annotations.image_counts().double() / max(len(annotations.images), 1)
    of_class = (threshold / share).sqrt().clamp(min=1)
    factors = torch.ones(len(annotations.images), dtype=torch.float64)
    for index, entry in enumerate(annotations.images):
        shown = [annotations.labels[found.category_id] - 1 for found in annotations.by_image[entry.id]]
        if shown:
            factors[index] = of_class[shown].amax()
    return factors


class RepeatFactorSampler(Sampler[int]):
    """Each image as often as its factor says, in random order; the same on every rank.

    What is over a whole number is drawn anew for every epoch, so that all epochs are of one length and each image comes
    as often as it should on average.

    Args:
        factors: ``[N]`` float64, from 1 up.
        seed: of the training.
    """

    def __init__(self, factors: Tensor, seed: int) -> None:
        self.whole, self.seed, self.epoch = factors.floor().long(), seed, 0
        over = factors - factors.floor()
        self.extra = int(over.sum().round())
        self.over = over * (self.extra / over.sum()) if self.extra else torch.zeros_like(over)

    def __len__(self) -> int:
        return int(self.whole.sum()) + self.extra

    def set_epoch(self, epoch: int) -> None:
        """What is drawn depends on seed and epoch alone."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * EPOCHS_APART + self.epoch)
        order = torch.randperm(len(self.whole), generator=generator)
        # Systematic sampling: where the sum, begun at a random fraction, passes a whole number, the image is repeated
        sums = self.over[order].cumsum(0) + torch.rand((), generator=generator, dtype=torch.float64)
        sums[-1:] += 1e-9
        repeats = sums.floor().diff(prepend=sums.new_zeros(1)).long()
        indices = order.repeat_interleave(self.whole[order] + repeats)
        yield from indices[torch.randperm(len(indices), generator=generator)].tolist()
