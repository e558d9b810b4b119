"""Data sets by name. A data set is a function of its config and a seed that returns `LongTailedData`."""

from __future__ import annotations

from collections.abc import Callable

from tde_trainer.data.base import ImageDataset, LongTailedData
from tde_trainer.data.digits_lt import digits_lt
from tde_trainer.schema import DataConfig

DATASETS: dict[str, Callable[[DataConfig, int], LongTailedData]] = {"digits_lt": digits_lt}

__all__ = ["DATASETS", "ImageDataset", "LongTailedData"]
