"""Focal loss: ``(1 - p)^g * CE``, which turns from samples that are classified well."""

from __future__ import annotations

from typing import Any

from tde_trainer.methods.base import Stage
from tde_trainer.methods.linear import Linear


class Focal(Linear):
    """Of the softmax's probability of the target."""

    def options(self, stage: Stage) -> dict[str, Any]:
        """See `Method.options`."""
        return {"focal_exponent": stage.config.focal_exponent}
