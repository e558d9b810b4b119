"""Splits of an ImageFolder tree, ``ROOT/SPLIT/CLASS/IMAGE``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from tde_trainer.data.base import ImageDataset
from tde_trainer.data.image_files import UNDECODABLE
from tde_trainer.data.source import Source
from tde_trainer.errors import UserError
from tde_trainer.schema import DataConfig

SHOWN_FROM = 2000  # fewer images are read before a bar could be seen
log = logging.getLogger(__name__)


def resampled(images: Tensor, size: int) -> Tensor:
    """``images [..., H, W]`` uint8 at ``size`` by ``size`` pixels."""
    return images if images.shape[-2:] == (size, size) else resize(images, [size, size], antialias=True)


def folder_splits(config: DataConfig) -> tuple[Source, Source]:
    """``ROOT/train``, and ``ROOT/test`` or ``ROOT/val``.

    Raises:
        UserError: a split is missing, without images, or of other classes.
    """
    train, test = folder_split(config, ["train"]), folder_split(config, ["test", "val"])
    differing = sorted(set(train.class_names) ^ set(test.class_names))
    if differing:
        raise UserError(f"data.root={config.root}: train and test hold other classes: {', '.join(differing[:3])}, ...")
    return train, test


def folder_split(config: DataConfig, names: Sequence[str]) -> Source:
    """The first of the splits ``names`` that is there; classes and images in the order of their names.

    Raises:
        UserError: none is there, or a class of it holds no image.
    """
    looked_for = [Path(config.root) / name for name in names]
    folder = next(filter(Path.is_dir, looked_for), None)
    if folder is None:
        raise UserError(
            f"data.root={config.root}: there is no folder {' or '.join(map(str, looked_for))}; wanted are images as "
            f"{looked_for[0]}/CLASS/IMAGE, as torchvision's ImageFolder reads them"
        )
    try:
        tree = ImageFolder(folder)
    except FileNotFoundError as error:
        raise UserError(f"data.root={config.root}: {error}") from error
    files = [path for path, _ in tree.samples]

    def read(indices: Tensor) -> ImageDataset:
        chosen = [files[i] for i in indices.tolist()]
        images, readable = _decoded(chosen, config.image_size, config.skip_corrupt)
        return ImageDataset(images[readable], labels[indices][readable])

    labels = torch.tensor(tree.targets)
    return Source(labels, tuple(tree.classes), read)


def _decoded(files: Sequence[str], size: int, skip_corrupt: bool) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, size, size]`` uint8, and ``[N]`` bool: which of them could be read."""
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    readable = torch.ones(len(files), dtype=torch.bool)
    few = len(files) < SHOWN_FROM
    for index, file in enumerate(track(files, f"reading {len(files)} images", transient=True, disable=few)):
        try:
            image = pil_to_tensor(pil_loader(file))
        except UNDECODABLE as error:
            if not skip_corrupt:
                raise UserError(f"cannot read {file}: {error}; data.skip_corrupt=true leaves it out") from error
            log.warning("left out %s: %s", file, error)
            readable[index] = False
            continue
        images[index] = resampled(image, size)
    return images, readable
