"""The interface of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from tde_kernels import FusedTDEHead
from tde_trainer.schema import HeadConfig


class Method(ABC):
    """A way to train a classifier on long-tailed data. Methods hold no state: that is the head's."""

    has_tde: bool = True  # whether TDE inference is reported beside the plain one

    @abstractmethod
    def build_head(self, in_features: int, num_classes: int, config: HeadConfig) -> FusedTDEHead:
        """The classifier, untrained."""

    def loss(self, head: FusedTDEHead, features: Tensor, target: Tensor) -> Tensor:
        """Training loss, a scalar, of ``features [B, D]`` and ``target [B]``; the head's EMA takes in the batch."""
        return head.loss(features, target)
