"""Accuracy per class and per shot."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_trainer.data.longtail import SHOTS, shot_masks

GROUPS = (*SHOTS, "overall")


def per_class_accuracy(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Recall per class, ``[C]`` float64 in 0 .. 1; NaN for a class without samples.

    Args:
        predicted: ``[N]`` int64 classes.
        target: ``[N]`` int64 classes.
        num_classes: C.
    """
    right, samples = (of.bincount(minlength=num_classes) for of in (target[predicted == target], target))
    return right.double() / samples


def group_masks(class_counts: Tensor) -> dict[str, Tensor]:
    """The classes of each group in `GROUPS`, ``[C]`` bool, by training images ``class_counts [C]``."""
    return {**shot_masks(class_counts), "overall": torch.ones_like(class_counts, dtype=torch.bool)}


def group_accuracy(per_class: Tensor, class_counts: Tensor) -> dict[str, float]:
    """Mean over the classes of each group in `GROUPS`; NaN for an empty group.

    On a balanced test set this is also the accuracy over its samples. Classes without samples are left out.

    Args:
        per_class: ``[C]`` accuracies.
        class_counts: ``[C]`` training images per class.
    """
    return {name: per_class[mask].nanmean().item() for name, mask in group_masks(class_counts).items()}
