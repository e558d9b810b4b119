"""Cutting a balanced data set to a long tail, and naming its parts."""

from __future__ import annotations

from torch import Tensor

MANY_ABOVE = 100  # more training images than this: many-shot
FEW_BELOW = 20  # fewer than this: few-shot
SHOTS = ("many", "medium", "few")


def long_tailed_counts(n_max: int, num_classes: int, ratio: float) -> list[int]:
    """Images to keep per class: ``n_i = int(n_max * ratio^(-i/(C-1)))``, head first."""
    last = max(num_classes - 1, 1)
    return [int(n_max * (1 / ratio) ** (i / last)) for i in range(num_classes)]


def shot_masks(class_counts: Tensor) -> dict[str, Tensor]:
    """Which classes are many-, medium- and few-shot, by training count.

    Args:
        class_counts: ``[C]`` int64.

    Returns:
        ``[C]`` bool masks under the names in `SHOTS`.
    """
    many, few = class_counts > MANY_ABOVE, class_counts < FEW_BELOW
    return {"many": many, "medium": ~(many | few), "few": few}
