"""The normalised multi-head classifiers, trained by Eq. 7 and read with and without TDE (Eq. 8)."""

from __future__ import annotations

from tde_kernels import FusedTDEHead
from tde_trainer.methods.base import Method
from tde_trainer.schema import HeadConfig, LossConfig


class Normalised(Method):
    """cosine, capsule, or the paper's deconfound, whose gamma keeps the effect of small weights small."""

    has_tde = True

    def __init__(self, normalizer: str) -> None:
        self.normalizer = normalizer

    def build_head(self, in_features: int, num_classes: int, head: HeadConfig, loss: LossConfig) -> FusedTDEHead:
        """See `Method.build_head`."""
        return FusedTDEHead(
            in_features,
            num_classes,
            normalizer=self.normalizer,
            num_heads=head.num_heads,
            tau=head.tau,
            gamma=head.gamma if self.normalizer == "deconfound" else 0.0,
            momentum=head.momentum,
        )
