"""The baseline: a linear classifier without bias."""

from __future__ import annotations

from tde_kernels import FusedTDEHead
from tde_trainer.methods.base import Method
from tde_trainer.schema import HeadConfig


class Linear(Method):
    """Softmax of ``x W^T``; has no temperature, heads or TDE."""

    has_tde = False

    def build_head(self, in_features: int, num_classes: int, config: HeadConfig) -> FusedTDEHead:
        """See `Method.build_head`."""
        return FusedTDEHead(
            in_features, num_classes, normalizer="linear", num_heads=1, tau=1.0, momentum=config.momentum
        )
