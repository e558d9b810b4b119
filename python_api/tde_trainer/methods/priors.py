"""Cross entropy of logits shifted by the classes' share of the training data; plain logits at test time."""

from __future__ import annotations

from typing import Any

from tde_trainer.methods.base import Stage
from tde_trainer.methods.linear import Linear


class BalancedSoftmax(Linear):
    """``z + log n_c``."""

    def options(self, stage: Stage) -> dict[str, Any]:
        """See `Method.options`."""
        return {"logit_bias": stage.class_counts.clamp(min=1).float().log()}


class LogitAdjustment(Linear):
    """``z + t * log(n_c / N)``: the balanced softmax where t = 1."""

    def options(self, stage: Stage) -> dict[str, Any]:
        """See `Method.options`."""
        prior = stage.class_counts.clamp(min=1).float() / stage.class_counts.sum()
        return {"logit_bias": stage.config.logit_adjustment * prior.log()}
