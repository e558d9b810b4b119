"""A three-layer convolutional network for images of a few pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torchvision.ops import Conv2dNormActivation

if TYPE_CHECKING:
    from tde_trainer.config import ModelConfig


def small_conv(config: ModelConfig) -> nn.Module:
    """Images ``[B, 1, H, W]`` to non-negative features ``[B, D]``."""
    return nn.Sequential(
        Conv2dNormActivation(1, config.width, 3),
        Conv2dNormActivation(config.width, config.features, 3, stride=2),
        Conv2dNormActivation(config.features, config.features, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
