"""Detectors by name: which classifier, trained by which loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tde_trainer.detection.losses import equalization_loss, softmax_equalization_loss
from tde_trainer.detection.predictor import BoxPredictor
from tde_trainer.detection.schema import DetectionHeadConfig, DetectionLossConfig

LOSSES = ("cross_entropy", "focal", "eql", "softmax_eql")


@dataclass(frozen=True)
class DetectionMethod:
    """A normalizer of Eq. 10, and the loss that it is trained by unless a recipe says another."""

    normalizer: str
    loss: str = "cross_entropy"

    @property
    def has_tde(self) -> bool:
        """Whether TDE inference is reported beside the plain one."""
        return self.normalizer != "linear"


METHODS: Mapping[str, DetectionMethod] = {
    "linear": DetectionMethod("linear"),
    "focal": DetectionMethod("linear", "focal"),
    "eql": DetectionMethod("linear", "eql"),
    "softmax_eql": DetectionMethod("linear", "softmax_eql"),
    "cosine": DetectionMethod("cosine"),
    "capsule": DetectionMethod("capsule"),
    "deconfound": DetectionMethod("deconfound"),
}


@dataclass(frozen=True)
class BoxClassification:
    """How a detector of C classes tells them, and the background, apart.

    Attributes:
        method: normalizer and own loss.
        head: its figures.
        loss: which loss, and its figures.
        rare: bool ``[C]``, the classes that the equalization losses spare.
    """

    method: DetectionMethod
    head: DetectionHeadConfig
    loss: DetectionLossConfig
    rare: Tensor

    @property
    def loss_name(self) -> str:
        """One of `LOSSES`."""
        return self.loss.name or self.method.loss

    @property
    def by_sigmoid(self) -> bool:
        """Whether classes are told apart one by one, with no class for the background."""
        return self.loss_name == "eql"

    def predictor(self, in_channels: int) -> BoxPredictor:
        """An untrained one, with one regression for all classes.

        Raises:
            ValueError: what the head refuses, such as channels that the heads do not divide.
        """
        linear = {"num_heads": 1, "tau": 1.0, "alpha": 0.0}
        of_own = {"num_heads": self.head.num_heads, "tau": self.head.tau, "alpha": self.head.alpha or 0.0}
        return BoxPredictor(
            in_channels,
            len(self.rare) + (not self.by_sigmoid),
            background_index=None if self.by_sigmoid else 0,
            class_agnostic=True,
            normalizer=self.method.normalizer,
            gamma=self.head.gamma if self.method.normalizer == "deconfound" else 0.0,
            momentum=self.head.momentum,
            **(of_own if self.method.has_tde else linear),
        )

    def classification_loss(self, predictor: BoxPredictor, x: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of box features ``x [N, D]``; the head direction takes in those with ``labels [N] > 0``."""
        head, mask = predictor.head, labels > 0
        if self.loss_name in ("cross_entropy", "focal"):
            focal: dict[str, Any] = {} if self.loss_name != "focal" else {"focal_exponent": self.loss.focal_exponent}
            return head.loss(x, labels, mask=mask, **focal)
        logits, rare = head(x, mask=mask), self.rare.to(x.device)
        if self.by_sigmoid:
            return equalization_loss(logits, labels, rare)
        return softmax_equalization_loss(logits, labels, rare, self.loss.softmax_eql_beta)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Of each class in each box, ``[N, C]``, from what a predictor returns in evaluation."""
        return scores.float().sigmoid() if self.by_sigmoid else scores.float().softmax(-1)[:, 1:]
