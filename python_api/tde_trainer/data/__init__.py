"""Data sets by name. A data set is a function of its config and a seed that returns `LongTailedData`."""

from __future__ import annotations

from collections.abc import Callable

from tde_trainer.data.base import ImageDataset, Images, LongTailedData
from tde_trainer.data.cifar import cifar10_lt, cifar100_lt
from tde_trainer.data.digits_lt import digits_lt
from tde_trainer.data.folder_lt import folder_lt
from tde_trainer.data.lists import imagenet_lt, list_lt, places_lt
from tde_trainer.data.loader import make_loader
from tde_trainer.data.pipeline import Pipeline
from tde_trainer.schema import DataConfig

DATASETS: dict[str, Callable[[DataConfig, int], LongTailedData]] = {
    "cifar100_lt": cifar100_lt,
    "cifar10_lt": cifar10_lt,
    "digits_lt": digits_lt,
    "folder_lt": folder_lt,
    "imagenet_lt": imagenet_lt,
    "places_lt": places_lt,
    "list_lt": list_lt,
}

__all__ = ["DATASETS", "ImageDataset", "Images", "LongTailedData", "Pipeline", "make_loader"]
