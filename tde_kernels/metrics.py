"""The scores by which alpha is chosen: functions of predictions ``[N]`` and labels ``[N]``, larger being better."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

Metric = Callable[[Tensor, Tensor], float]


def _accuracy(predicted: Tensor, y: Tensor) -> float:
    return (predicted == y).double().mean().item()


def resolve(metric: str | Metric, num_classes: int) -> Metric:
    """The metric of that name, "accuracy" or "mean_per_class" (over the classes present), or the function itself."""
    if callable(metric):
        return metric

    def mean_per_class(predicted: Tensor, y: Tensor) -> float:
        count = torch.bincount(y, minlength=num_classes)
        hits = torch.bincount(y[predicted == y], minlength=num_classes)
        return (hits[count > 0] / count[count > 0].double()).mean().item()

    known: dict[str, Metric] = {"accuracy": _accuracy, "mean_per_class": mean_per_class}
    if metric not in known:
        nearest = difflib.get_close_matches(str(metric), known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"metric must be one of {', '.join(known)} or a function, got {metric!r}{hint}")
    return known[metric]
