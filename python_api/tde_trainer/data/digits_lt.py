"""digits_lt: scikit-learn's 1,797 real 8x8 digits, made long-tailed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.transforms import v2

from tde_trainer.data.base import ImageDataset, LongTailedData
from tde_trainer.data.longtail import long_tailed_counts
from tde_trainer.errors import UserError

if TYPE_CHECKING:
    from tde_trainer.config import DataConfig


def digits_lt(config: DataConfig, seed: int) -> LongTailedData:
    """Split the digits and cut the training part to a long tail.

    Per class, a seeded shuffle gives ``test_per_class`` images to test, the next ``val_per_class`` to validation,
    and the rest may be trained on. ``n_max`` is what the smallest class has left, so that the counts follow the
    formula exactly. Classes keep label order, as in CIFAR-LT: 0 is the head, 9 the tail.

    Raises:
        UserError: the splits ask for more images than there are, or leave a class without any.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)  # [N, 1, 8, 8] in 0 .. 1
    labels = torch.from_numpy(digits.target).long()
    held_out = config.test_per_class + config.val_per_class
    n_max = int(labels.bincount().min()) - held_out
    counts = long_tailed_counts(n_max, len(digits.target_names), config.ratio)
    if min(counts) < 1:
        raise UserError(
            f"data.test_per_class={config.test_per_class}, data.val_per_class={config.val_per_class} and "
            f"data.ratio={config.ratio:g} leave class counts {counts}: every class needs at least one training image"
        )
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {"test": [], "val": [], "train": []}
    for label, count in enumerate(counts):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        test, val, rest = members.split([config.test_per_class, config.val_per_class, len(members) - held_out])
        parts["test"].append(test)
        parts["val"].append(val)
        parts["train"].append(rest[:count])
    shift = v2.RandomCrop(8, padding=1)  # up to one pixel each way
    index = {name: torch.cat(pieces) for name, pieces in parts.items()}
    return LongTailedData(
        train=ImageDataset(images[index["train"]], labels[index["train"]], shift),
        val=ImageDataset(images[index["val"]], labels[index["val"]]),
        test=ImageDataset(images[index["test"]], labels[index["test"]]),
        class_names=tuple(str(name) for name in digits.target_names),
    )
