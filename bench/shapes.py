"""The shapes that every figure of this project is measured at."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A classifier at work: batch, channels of a feature, classes, heads."""

    batch: int
    dim: int
    classes: int
    heads: int = 2

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

# What grows while the rest stays. Classes lead up to the million, with 1/16 of its batch and 1/8 of its channels.
SCALING = {
    "batch": {f"batch_{size}": Shape(size, 512, 1000) for size in (8, 32, 128, 512, 2048, 8192)},
    "dim": {f"dim_{size}": Shape(512, size, 1000) for size in (32, 128, 512, 2048, 8192)},
    "classes": {f"classes_{size}": Shape(256, 64, size) for size in (10, 100, 1000, 10_000, 100_000, 1_000_000)},
    "heads": {f"heads_{size}": Shape(512, 512, 1000, size) for size in (1, 4, 16, 64)},
}
ALL = SHAPES | {name: shape for axis in SCALING.values() for name, shape in axis.items()}
