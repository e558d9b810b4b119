"""A small convolutional network for images of a few pixels."""

from __future__ import annotations

from torch import nn
from torchvision.ops import Conv2dNormActivation

from tde_trainer.models.backbone import Backbone
from tde_trainer.schema import ModelConfig

GRID = 4


def small_conv(config: ModelConfig, channels: int) -> Backbone:
    """Images ``[B, channels, H, W]`` to non-negative features ``[B, D]``.

    The last layer sees positions, not averages: where a stroke lies is what tells digits apart.
    """
    module = nn.Sequential(
        Conv2dNormActivation(channels, config.width, 3),
        Conv2dNormActivation(config.width, 2 * config.width, 3, stride=2),
        nn.AdaptiveAvgPool2d(GRID),  # leaves 8x8 images as they are
        nn.Flatten(),
        nn.Linear(2 * config.width * GRID**2, config.features, bias=False),
        nn.BatchNorm1d(config.features),
        nn.ReLU(),
    )
    return Backbone(module, config.features)
