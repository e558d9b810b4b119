"""Cutting a balanced data set to a long tail, and naming its parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MANY_ABOVE = 100  # more training images than this: many-shot
FEW_BELOW = 20  # fewer than this: few-shot
SHOTS = ("many", "medium", "few")


def long_tailed_counts(n_max: int, num_classes: int, ratio: float) -> list[int]:
    """Images to keep per class: ``n_i = int(n_max * ratio^(-i/(C-1)))``, head first."""
    last = max(num_classes - 1, 1)
    return [int(n_max * (1 / ratio) ** (i / last)) for i in range(num_classes)]


def long_tailed_selection(labels: Tensor, counts: list[int], seed: int) -> Tensor:
    """Indices of ``counts[c]`` samples of every class c, int64, classes in label order.

    Each class in turn is shuffled by numpy's legacy generator and its first samples are kept: with seed 0 these are
    the images of the published CIFAR-LT.

    Args:
        labels: ``[N]`` int64, with at least ``counts[c]`` samples of every class.
    """
    generator = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts):
        members = (labels == label).nonzero().flatten().numpy()
        generator.shuffle(members)
        kept.append(torch.from_numpy(members[:count].copy()))
    return torch.cat(kept)


def shot_masks(class_counts: Tensor) -> dict[str, Tensor]:
    """Which classes are many-, medium- and few-shot, by training count.

    Args:
        class_counts: ``[C]`` int64.

    Returns:
        ``[C]`` bool masks under the names in `SHOTS`.
    """
    many, few = class_counts > MANY_ABOVE, class_counts < FEW_BELOW
    return {"many": many, "medium": ~(many | few), "few": few}
