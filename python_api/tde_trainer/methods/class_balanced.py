"""Class-balanced loss: classes weighted by the inverse of their effective number of samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tde_trainer.methods.base import Stage
from tde_trainer.methods.linear import Linear


def effective_weight(stage: Stage) -> Tensor:
    """``(1 - b) / (1 - b^n_c)``, scaled to sum to C, ``[C]`` float32."""
    weight = 1 / (1 - stage.config.class_balanced_beta ** stage.class_counts.clamp(min=1).double())
    return (weight * (len(weight) / weight.sum())).float()


class ClassBalanced(Linear):
    """Cross entropy so weighted."""

    def options(self, stage: Stage) -> dict[str, Any]:
        """See `Method.options`."""
        return {"class_weight": effective_weight(stage)}
