"""From stored bytes to a network's input: whole batches at a time, wherever they are, each sample by its own draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import rgb_to_grayscale


@cache  # a copy to the device for every batch would wait for it
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``values`` of images in 0 .. 1 for bytes, ``[channels, 1, 1]``."""
    return 255 * torch.tensor(values, device=device)[:, None, None]


@dataclass(frozen=True)
class Pipeline:
    """Random crop, flip and colours in training, then ``(image / 255 - mean) / std`` per channel.

    Args:
        mean: per channel, of images in 0 .. 1.
        std: the same.
        padding: black pixels added on every side, of which the crop leaves as many out again.
        flip: mirror half of the images left to right.
        jitter: brightness, contrast and saturation, in this order, are scaled by factors from ``1 - jitter`` to
            ``1 + jitter``, as torchvision's ``ColorJitter`` does; for images of three channels.
    """

    mean: Sequence[float]
    std: Sequence[float]
    padding: int = 0
    flip: bool = False
    jitter: float = 0.0

    def __call__(self, images: Tensor, *, training: bool) -> Tensor:
        """``images [B, channels, H, W]`` uint8 as float32."""
        if training and (self.padding or self.flip):
            images = self._moved(images)
        pixels = images.float()
        if training and self.jitter:
            pixels = self._coloured(pixels)
        mean, std = (_per_channel(tuple(a), images.device) for a in (self.mean, self.std))
        return (pixels - mean) / std

    def _moved(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        device = images.device

        def drawn(high: int) -> Tensor:
            return torch.randint(high, (batch, 1), device=device)

        rows = drawn(2 * self.padding + 1) + torch.arange(height, device=device)
        columns = drawn(2 * self.padding + 1) + torch.arange(width, device=device)
        if self.flip:
            columns = torch.where(drawn(2).bool(), columns.flip(1), columns)
        padded = pad(images, [self.padding] * 4)
        sample = torch.arange(batch, device=device)[:, None, None, None]
        channel = torch.arange(channels, device=device)[:, None, None]
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def _coloured(self, pixels: Tensor) -> Tensor:
        shape = (3, len(pixels), 1, 1, 1)
        brightness, contrast, saturation = torch.empty(shape, device=pixels.device).uniform_(
            1 - self.jitter, 1 + self.jitter
        )
        pixels = (brightness * pixels).clamp(0, 255)
        mean: Tensor = rgb_to_grayscale(pixels).mean((1, 2, 3), keepdim=True)
        pixels = mean.lerp(pixels, contrast).clamp(0, 255)
        grey: Tensor = rgb_to_grayscale(pixels)
        return grey.lerp(pixels, saturation).clamp(0, 255)
