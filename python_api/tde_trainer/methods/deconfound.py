"""The paper's method: de-confounded training (Eq. 7), TDE inference (Eq. 8)."""

from __future__ import annotations

from tde_kernels import FusedTDEHead
from tde_trainer.methods.base import Method
from tde_trainer.schema import HeadConfig


class Deconfound(Method):
    """Class weights are normalised by ``||w|| + gamma``: gamma keeps small weights small."""

    def build_head(self, in_features: int, num_classes: int, config: HeadConfig) -> FusedTDEHead:
        """See `Method.build_head`."""
        return FusedTDEHead(
            in_features,
            num_classes,
            normalizer="deconfound",
            num_heads=config.num_heads,
            tau=config.tau,
            gamma=config.gamma,
            momentum=config.momentum,
        )
