"""Nearest class mean: ``z_i = -||u - m_i||^2`` with ``u = (x - mean) / ||x - mean||`` and its class means ``m_i``.

As a linear classifier, ``2 (<u, m_i> - ||m_i||^2 / 2)`` up to ``||u||^2 = 1``: a channel that is always 1 carries the
second term.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from tde_kernels import FusedTDEHead
from tde_trainer.methods.decouple import take_weight
from tde_trainer.methods.two_stage import SecondStage, StageOne
from tde_trainer.models import Backbone
from tde_trainer.schema import HeadConfig, LossConfig


def class_means(x: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Mean of the features ``x [N, D]`` of each class ``y [N]``, ``[C, D]``; every class must have some."""
    totals = x.new_zeros(num_classes, x.shape[1], dtype=torch.float64).index_add_(0, y, x.double())
    return (totals / y.bincount(minlength=num_classes)[:, None]).to(x.dtype)


class Centred(nn.Module):
    """``[x - mean, of unit norm; 1]``: ``[B, D]`` to ``[B, D + 1]``."""

    mean: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return pad(normalize(x - self.mean, dim=-1), (0, 1), value=1.0)


class NearestClassMean(SecondStage):
    """The means are those of stage 1's training features."""

    def build_neck(self, in_features: int, num_classes: int) -> Backbone:
        """See `Method.build_neck`."""
        return Backbone(Centred(in_features), in_features + 1)

    def build_head(self, in_features: int, num_classes: int, head: HeadConfig, loss: LossConfig) -> FusedTDEHead:
        """See `Method.build_head`."""
        return FusedTDEHead(in_features, num_classes, normalizer="linear", num_heads=1, tau=2.0, momentum=head.momentum)

    def begin(self, neck: nn.Module, head: FusedTDEHead, first: StageOne) -> dict[str, Any]:
        """See `SecondStage.begin`."""
        assert isinstance(neck, Centred)
        x, y = first.features("train")
        neck.mean.copy_(x.mean(0))
        means = class_means(neck(x)[:, :-1], y, head.num_classes)
        take_weight(head, torch.cat([means, -(means**2).sum(1, keepdim=True) / 2], 1))
        return {}
