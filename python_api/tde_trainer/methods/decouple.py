"""Classifiers for frozen features (Decouple): as trained, trained anew, or with the classes' norms put right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tde_kernels import FusedTDEHead
from tde_kernels import functional as F
from tde_trainer.methods.two_stage import SecondStage, StageOne
from tde_trainer.metrics import per_class_accuracy
from tde_trainer.schema import HeadConfig, LossConfig


def take_weight(head: FusedTDEHead, weight: Tensor) -> None:
    """Overwrite the classifier's weight ``[C, D]``."""
    with torch.no_grad():
        head.weight.copy_(weight)


class Joint(SecondStage):
    """The classifier of stage 1."""

    def begin(self, neck: nn.Module, head: FusedTDEHead, first: StageOne) -> dict[str, Any]:
        """See `SecondStage.begin`."""
        take_weight(head, first.weight)
        return {}


class ClassifierRetraining(SecondStage):
    """cRT: a fresh linear classifier, trained with each class as often."""

    epochs = 10

    def begin(self, neck: nn.Module, head: FusedTDEHead, first: StageOne) -> dict[str, Any]:
        """See `SecondStage.begin`."""
        return {}


class LearnableWeightScaling(SecondStage):
    """LWS: ``z_i = <x, w_i> / g_i``, of which only ``g`` is trained."""

    epochs = 5

    def build_head(self, in_features: int, num_classes: int, head: HeadConfig, loss: LossConfig) -> FusedTDEHead:
        """See `Method.build_head`."""
        return FusedTDEHead(in_features, num_classes, normalizer="lws", num_heads=1, tau=1.0, momentum=head.momentum)

    def begin(self, neck: nn.Module, head: FusedTDEHead, first: StageOne) -> dict[str, Any]:
        """See `SecondStage.begin`."""
        take_weight(head, first.weight)
        return {}

    def parameter_groups(self, backbone: nn.Module, neck: nn.Module, head: FusedTDEHead) -> list[dict[str, Any]]:
        """See `Method.parameter_groups`."""
        return [{"params": [head.class_scale], "lr_factor": 1.0}]


class TauNorm(SecondStage):
    """``z_i = <x, w_i> / ||w_i||^p``, p of 0, 0.1 .. 2 by the mean accuracy over classes on validation data.

    The weights are kept so normalised, and the classifier is a linear one.
    """

    def begin(self, neck: nn.Module, head: FusedTDEHead, first: StageOne) -> dict[str, Any]:
        """See `SecondStage.begin`."""
        x, y = first.features("val")
        exponents = [round(p, 6) for p in torch.linspace(0, 2, 21, dtype=torch.float64).tolist()]
        scores = [self._score(x, y, first.weight, p) for p in exponents]
        chosen = exponents[max(range(len(scores)), key=scores.__getitem__)]
        take_weight(head, first.weight / first.weight.norm(dim=1, keepdim=True) ** chosen)
        return {"exponent": chosen, "exponents": exponents, "val": scores}

    @staticmethod
    def _score(x: Tensor, y: Tensor, weight: Tensor, exponent: float) -> float:
        logits = F.grouped_logits(x, weight, num_heads=1, tau=1.0, normalizer="tau_norm", exponent=exponent)
        return per_class_accuracy(logits.argmax(-1), y, len(weight)).nanmean().item()
