"""Features of a whole data set in one file, ours or other people's: ``SPLIT_x [N, D]`` and ``SPLIT_y [N]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tde_trainer.errors import UserError
from tde_trainer.evaluate import Features
from tde_trainer.schema import SPLITS
from tde_trainer.tensor_file import one_line, read_safetensors, write_safetensors

FILE = "features.safetensors"  # in the folder of a training


@dataclass(frozen=True)
class FeatureFile:
    """What such a file holds."""

    splits: dict[str, Features]
    class_counts: Tensor  # [C] int64, training samples of each class
    checkpoint: str = ""  # hash of the checkpoint that the features come from; empty where they are other people's

    def split(self, name: str) -> Features:
        """Features of a split.

        Raises:
            UserError: it is not in the file.
        """
        if name not in self.splits:
            raise UserError(
                f"the features have no split {name!r} ({name}_x, {name}_y); there are: {_list(self.splits)}"
            )
        return self.splits[name]


def save_features(path: Path, kept: FeatureFile) -> None:
    """Write the file, atomically."""
    tensors = {"class_counts": kept.class_counts}
    for name, features in kept.splits.items():
        tensors |= {f"{name}_x": features.x, f"{name}_y": features.y}
    write_safetensors(path, tensors, {"checkpoint": kept.checkpoint})


def load_features(path: Path) -> FeatureFile:
    """Read a ``.safetensors`` or ``.npz`` file; ``class_counts`` may be left out, and are those of ``train_y`` then.

    Raises:
        UserError: it is missing, corrupt or holds something else.
    """
    tensors, checkpoint = _tensors(path)
    splits = {name: _split(path, tensors, name) for name in SPLITS if f"{name}_x" in tensors or f"{name}_y" in tensors}
    if not splits:
        raise UserError(
            f"{path} holds no features: wanted are arrays train_x, train_y, val_x, ..., got {_list(tensors)}"
        )
    widths = {name: features.x.shape[1] for name, features in splits.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"{path}: features must be as wide in every split, got {widths}")
    largest = max(int(features.y.max()) for features in splits.values() if len(features.y))
    counts = tensors.get("class_counts")
    if counts is None:
        if "train" not in splits:
            raise UserError(f"{path} holds neither class_counts nor train_y, from which they could be counted")
        counts = splits["train"].y.bincount(minlength=largest + 1)
    if counts.dim() != 1 or counts.dtype.is_floating_point or len(counts) <= largest:
        raise UserError(
            f"{path}: class_counts must be whole numbers [C] with C above the largest label, {largest}, "
            f"got {counts.dtype} {list(counts.shape)}"
        )
    return FeatureFile(splits, counts.long(), checkpoint)


def _tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    if not path.is_file():
        raise UserError(f"no features at {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}, ""
        tensors, metadata = read_safetensors(path)
        return tensors, metadata.get("checkpoint", "")
    except Exception as error:  # of a damaged zip file it can be any
        raise UserError(f"cannot read features from {path}: {one_line(error)}") from error


def _split(path: Path, tensors: Mapping[str, Tensor], name: str) -> Features:
    x, y = (tensors.get(f"{name}_{part}") for part in "xy")
    if x is None or y is None:
        raise UserError(f"{path} holds only one of {name}_x and {name}_y")
    if x.dim() != 2 or not x.is_floating_point() or y.shape != x.shape[:1] or y.is_floating_point():
        raise UserError(
            f"{path}: {name}_x must be floating point [N, D] and {name}_y whole numbers [N], "
            f"got {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
        )
    if len(y) and int(y.min()) < 0:
        raise UserError(f"{path}: {name}_y holds the label {int(y.min())}; labels must not be negative")
    return Features(x.float(), y.long())


def _list(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:8]) or "nothing"
