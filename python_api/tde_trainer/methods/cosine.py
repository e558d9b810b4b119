"""Cosine classifier; with TDE inference it is the paper's Cosine-TDE."""

from __future__ import annotations

from tde_kernels import FusedTDEHead
from tde_trainer.methods.base import Method
from tde_trainer.schema import HeadConfig


class Cosine(Method):
    """Both features and class weights are normalised, per head."""

    def build_head(self, in_features: int, num_classes: int, config: HeadConfig) -> FusedTDEHead:
        """See `Method.build_head`."""
        return FusedTDEHead(
            in_features,
            num_classes,
            normalizer="cosine",
            num_heads=config.num_heads,
            tau=config.tau,
            gamma=0.0,
            momentum=config.momentum,
        )
