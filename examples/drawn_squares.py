"""What the detector of the examples is trained on: two squares in an image, of hues that nearly touch."""

from __future__ import annotations

import colorsys

import torch
from torch import Tensor

Target = dict[str, Tensor]


def draw(classes: Tensor) -> tuple[Tensor, Target]:
    """An image ``[3, 64, 64]`` of noise with a square of each class, in a quarter of its own."""
    image, boxes = 0.3 * torch.rand(3, 64, 64), []
    for hue, corner in zip(classes.tolist(), torch.tensor([[0, 0], [0, 32], [32, 0], [32, 32]]), strict=False):
        side = int(torch.randint(12, 24, ()))
        top, left = (corner + torch.randint(0, 32 - side, (2,))).tolist()
        shade = hue / 12 + 0.06 * float(torch.rand(()))  # a half turn of the wheel; neighbours nearly touch
        colour = torch.tensor(colorsys.hsv_to_rgb(shade, 0.7, 0.9))
        image[:, top : top + side, left : left + side] = colour[:, None, None] + 0.1 * torch.randn(3, side, side)
        boxes.append([left, top, left + side, top + side])
    return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": classes}


def scenes(counts: Tensor) -> list[tuple[Tensor, Target]]:
    """Images of two squares each, ``counts [C]`` of every class in all."""
    classes = torch.repeat_interleave(counts)
    return [draw(pair) for pair in classes[torch.randperm(len(classes))].split(2)]
