"""OLTR: features enriched from a memory of class centroids M, and a capsule classifier.

    v = reach * (x + select * softmax(W_h x) M),    select = tanh(W_s x),    reach = 10 / min_c ||x - M_c||

A margin loss draws features to their own centroid and from the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tde_kernels import FusedTDEHead
from tde_trainer.methods.base import Batch, Stage
from tde_trainer.methods.ncm import class_means
from tde_trainer.methods.two_stage import SecondStage, StageOne
from tde_trainer.models import Backbone
from tde_trainer.schema import Config, HeadConfig, LossConfig, TrainConfig

REACH = 10.0
EPSILON = 1e-6  # the least distance that counts
CAPSULE_SCALE = 16.0
FINE_TUNING = 0.1  # of the learning rate, for what stage 1 has learned already: backbone and centroids


class Memory(nn.Module):
    """The meta-embedding, ``[B, D]`` to ``[B, D]``."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.zeros(num_classes, features))
        self.recall = nn.Linear(features, num_classes)  # W_h
        self.select = nn.Linear(features, features)  # W_s

    def forward(self, x: Tensor) -> Tensor:
        reach = REACH / self.distances(x).amin(1, keepdim=True).clamp(min=EPSILON)
        recalled = self.recall(x).softmax(-1) @ self.centroids
        embedded: Tensor = reach * (x + self.select(x).tanh() * recalled)
        return embedded

    def distances(self, x: Tensor) -> Tensor:
        """``||x - M_c||``, ``[B, C]``."""
        # Not by a matrix product, which leaves nothing of a small distance, such as that of a class's only image.
        return torch.cdist(x.float(), self.centroids, compute_mode="donot_use_mm_for_euclid_dist")


def margin_loss(distances: Tensor, target: Tensor, margin: float) -> Tensor:
    """Mean of ``max(0, own - mean of the others + margin)`` over distances ``[B, C]`` to centroids."""
    own = distances.gather(1, target[:, None]).squeeze(1)
    others = (distances.sum(1) - own) / max(distances.shape[1] - 1, 1)
    return (own - others + margin).relu().mean()


class OLTR(SecondStage):
    """Decouple-OLTR: the backbone stays frozen."""

    epochs = 10

    def build_neck(self, in_features: int, num_classes: int) -> Backbone:
        """See `Method.build_neck`."""
        return Backbone(Memory(in_features, num_classes), in_features)

    def build_head(self, in_features: int, num_classes: int, head: HeadConfig, loss: LossConfig) -> FusedTDEHead:
        """See `Method.build_head`."""
        scale, momentum = CAPSULE_SCALE, head.momentum
        return FusedTDEHead(in_features, num_classes, normalizer="capsule", num_heads=1, tau=scale, momentum=momentum)

    def begin(self, neck: nn.Module, head: FusedTDEHead, first: StageOne) -> dict[str, Any]:
        """See `SecondStage.begin`."""
        assert isinstance(neck, Memory)
        with torch.no_grad():
            neck.centroids.copy_(class_means(*first.features("train"), head.num_classes))
        return {}

    def parameter_groups(self, backbone: nn.Module, neck: nn.Module, head: FusedTDEHead) -> list[dict[str, Any]]:
        """See `Method.parameter_groups`."""
        assert isinstance(neck, Memory)
        fresh = [*neck.recall.parameters(), *neck.select.parameters(), *head.parameters()]
        return [{"params": fresh, "lr_factor": 1.0}, {"params": [neck.centroids], "lr_factor": FINE_TUNING}]

    def loss(self, neck: nn.Module, head: FusedTDEHead, features: Tensor, batch: Batch, stage: Stage) -> Tensor:
        """See `Method.loss`."""
        assert isinstance(neck, Memory)
        classified = super().loss(neck, head, features, batch, stage)
        apart = margin_loss(neck.distances(features), batch.target, stage.config.centroid_margin)
        return classified + stage.config.centroid_weight * apart


class FineTunedOLTR(OLTR):
    """OLTR: the backbone is trained further, for as long as stage 1 was."""

    freezes_backbone = False

    def schedule(self, config: Config) -> TrainConfig:
        """See `Method.schedule`."""
        epochs = config.stage_two.epochs or config.train.epochs
        return replace(config.train, epochs=epochs, sampler="class_aware")

    def parameter_groups(self, backbone: nn.Module, neck: nn.Module, head: FusedTDEHead) -> list[dict[str, Any]]:
        """See `Method.parameter_groups`."""
        trained = super().parameter_groups(backbone, neck, head)
        return [*trained, {"params": list(backbone.parameters()), "lr_factor": FINE_TUNING}]
