"""The interface of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from tde_kernels import FusedTDEHead
from tde_trainer.models import Backbone
from tde_trainer.schema import Config, HeadConfig, LossConfig, ModelConfig, TrainConfig


class Stage(NamedTuple):
    """What a method may know beside the batch."""

    class_counts: Tensor  # [C] int64, training images of each class
    done: float  # share of the epochs that are over, 0 .. 1
    config: LossConfig


class Batch(NamedTuple):
    """What the network is trained with: images on the device, and one target for each row of features, or two."""

    images: Tensor
    target: Tensor  # [B] int64
    target_b: Tensor | None = None  # [B] int64: the loss is lam * CE(target) + (1 - lam) * CE(target_b)
    lam: Tensor | None = None  # 0-d float


Draw = Callable[[float], tuple[Tensor, Tensor]]
"""``draw(power)``: as many augmented training images as the batch has, and their targets, their classes drawn with a
probability ``~ n_c^power``: 1 as the data are, 0 each class as often, -1 in reverse."""


class Method(ABC):
    """A way to train a classifier on long-tailed data. Methods hold no state: that is the head's."""

    has_tde: bool = False  # whether TDE inference is reported beside the plain one

    @abstractmethod
    def build_head(self, in_features: int, num_classes: int, head: HeadConfig, loss: LossConfig) -> FusedTDEHead:
        """The classifier, untrained."""

    def build_neck(self, in_features: int, num_classes: int) -> Backbone:
        """What lies between backbone and classifier: from features ``[B, in_features]`` to others, and their number."""
        return Backbone(nn.Identity(), in_features)

    def model(self, config: ModelConfig) -> ModelConfig:
        """The backbone that it needs, given the one asked for."""
        return config

    def schedule(self, config: Config) -> TrainConfig:
        """How it is trained, given what the recipe says."""
        return config.train

    def parameter_groups(self, backbone: nn.Module, neck: nn.Module, head: FusedTDEHead) -> list[dict[str, Any]]:
        """What is trained, in groups for the optimizer; ``lr_factor`` of a group multiplies the learning rate."""
        return [{"params": [*backbone.parameters(), *neck.parameters(), *head.parameters()], "lr_factor": 1.0}]

    def compose(self, images: Tensor, target: Tensor, stage: Stage, draw: Draw) -> Batch:
        """The batch to train with, from augmented ``images [B, ...]`` and their ``target [B]``."""
        return Batch(images, target)

    def options(self, stage: Stage) -> dict[str, Any]:
        """Options of :meth:`tde_kernels.FusedTDEHead.loss`, which all losses here are."""
        return {}

    def mixed(self, features: Tensor, stage: Stage) -> Tensor:
        """The features that are classified in training, from those of the backbone."""
        return features

    def loss(self, neck: nn.Module, head: FusedTDEHead, features: Tensor, batch: Batch, stage: Stage) -> Tensor:
        """Training loss, a scalar; the head's EMA takes in the batch."""
        two = {} if batch.target_b is None else {"target_b": batch.target_b, "lam": batch.lam}
        return head.loss(neck(self.mixed(features, stage)), batch.target, **two, **self.options(stage))
