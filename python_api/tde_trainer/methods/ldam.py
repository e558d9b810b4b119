"""LDAM: margins that grow as classes shrink, on a cosine classifier; with DRW, re-weighted late in training."""

from __future__ import annotations

from typing import Any

from tde_kernels import FusedTDEHead
from tde_trainer.methods.base import Method, Stage
from tde_trainer.methods.class_balanced import effective_weight
from tde_trainer.schema import HeadConfig, LossConfig


class LDAM(Method):
    """``CE(s * (cos - m_y))`` with ``m_c ~ n_c^(-1/4)``, the largest of them ``ldam_margin``.

    Args:
        deferred: class-balanced weights from ``drw_from`` of the epochs on ("DRW").
    """

    def __init__(self, deferred: bool = False) -> None:
        self.deferred = deferred

    def build_head(self, in_features: int, num_classes: int, head: HeadConfig, loss: LossConfig) -> FusedTDEHead:
        """See `Method.build_head`."""
        scale, momentum = loss.ldam_scale, head.momentum
        return FusedTDEHead(in_features, num_classes, normalizer="cosine", num_heads=1, tau=scale, momentum=momentum)

    def options(self, stage: Stage) -> dict[str, Any]:
        """See `Method.options`."""
        margin = stage.class_counts.clamp(min=1).float() ** -0.25
        options = {"margin": margin * (stage.config.ldam_scale * stage.config.ldam_margin / margin.max())}
        if self.deferred and stage.done >= stage.config.drw_from:
            options["class_weight"] = effective_weight(stage)
        return options
