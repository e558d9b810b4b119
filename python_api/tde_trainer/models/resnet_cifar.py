"""ResNet-32 for images of 32 by 32 pixels: 3 stages of 5 basic blocks, shortcuts without parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from tde_trainer.models.backbone import Backbone
from tde_trainer.schema import ModelConfig

STAGES = (16, 32, 64)
BLOCKS = 5


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut drops every other pixel and pads channels with zeros ("option A")."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.missing = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.missing:
            x = pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
        return relu(out + x)


class Branches(nn.ModuleList):
    """Modules side by side, their maps one after the other along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


class ResNetCifar(nn.Module):
    """Images ``[B, channels, H, W]`` to features ``[B, 64 * branches]``.

    Args:
        branches: parallel copies of the last block. BBN reads two: of them the first half of the features is its
            conventional branch, the second its re-balancing one.
    """

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width_in = STAGES[0]
        for stage, width in enumerate(STAGES):
            for block in range(BLOCKS):
                blocks.append(BasicBlock(width_in, width, 2 if stage and not block else 1))
                width_in = width
        blocks.pop()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, STAGES[0], 3, padding=1, bias=False), nn.BatchNorm2d(STAGES[0]), nn.ReLU()
        )
        self.trunk = nn.Sequential(*blocks)
        self.branches = Branches(BasicBlock(width_in, width_in, 1) for _ in range(branches))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.branches(self.trunk(self.stem(images)))
        return maps.mean((2, 3))


def resnet32(config: ModelConfig, channels: int) -> Backbone:
    """About 0.46 M parameters with one branch."""
    return Backbone(ResNetCifar(channels, config.branches), STAGES[-1] * config.branches)
