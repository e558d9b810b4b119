"""The baseline: a linear classifier without bias, and cross entropy."""

from __future__ import annotations

from tde_kernels import FusedTDEHead
from tde_trainer.methods.base import Method
from tde_trainer.schema import HeadConfig, LossConfig


class Linear(Method):
    """Softmax of ``x W^T``; has no temperature, heads or TDE."""

    def build_head(self, in_features: int, num_classes: int, head: HeadConfig, loss: LossConfig) -> FusedTDEHead:
        """See `Method.build_head`."""
        return FusedTDEHead(in_features, num_classes, normalizer="linear", num_heads=1, tau=1.0, momentum=head.momentum)
