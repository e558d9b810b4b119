"""The shapes that every figure of this project is measured at."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A classifier at work: batch, channels of a feature, classes."""

    batch: int
    dim: int
    classes: int

    def product_flops(self) -> int:
        """Of one product of features and weights; a training step takes three."""
        return 2 * self.batch * self.dim * self.classes


SHAPES = {
    "cifar10": Shape(512, 64, 10),
    "cifar100": Shape(512, 64, 100),
    "imagenet_lt": Shape(512, 2048, 1000),
    "inat18": Shape(512, 2048, 8142),
    "lvis": Shape(8192, 1024, 1231),
    "imagenet21k": Shape(1024, 2048, 21841),
    "million": Shape(4096, 512, 1_000_000),
}

# On a CPU the million is scaled down: 1/16 of the batch, 1/8 of the channels, all of the classes. The other decades of
# classes lead up to it.
SCALING = {f"classes_{classes}": Shape(256, 64, classes) for classes in (10, 100, 1000, 10_000, 100_000, 1_000_000)}
SHAPES |= SCALING

# What a small CPU gets through in minutes
CPU_SHAPES = ("cifar100", "imagenet_lt", "lvis")
LOSS_SHAPES = ("imagenet_lt", "lvis", "inat18", "imagenet21k", *SCALING)
