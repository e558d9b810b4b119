"""Backbones by name: functions of the model's config and the images' channels."""

from __future__ import annotations

from collections.abc import Callable

from tde_trainer.models.backbone import Backbone
from tde_trainer.models.resnet_cifar import resnet32
from tde_trainer.models.small_conv import small_conv
from tde_trainer.schema import ModelConfig

MODELS: dict[str, Callable[[ModelConfig, int], Backbone]] = {"resnet32": resnet32, "small_conv": small_conv}

__all__ = ["MODELS", "Backbone"]
