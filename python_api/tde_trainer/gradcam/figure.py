"""A figure of activation maps: a row for each image, a column for each network."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tde_trainer.gradcam.maps import ActivationMaps
from tde_trainer.plots import png

SIDE = 1.9  # inches of an image
LETTERS = 11  # of the caption, in an inch


@dataclass(frozen=True)
class Shown:
    """What the figure shows of some images."""

    images: Tensor  # [N, channels, H, W] uint8
    labels: list[int]  # [N]
    class_names: Sequence[str]
    columns: dict[str, ActivationMaps]  # by name of the network
    caption: str


def draw_maps(shown: Shown) -> bytes:
    """A PNG: each image with its class, then every network's map over it, with what it takes the image for."""
    rows, columns = len(shown.images), 1 + len(shown.columns)
    figure = Figure(figsize=(SIDE * columns, (SIDE + 0.2) * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for row, (image, label) in enumerate(zip(shown.images, shown.labels, strict=True)):
        first, *others = panels[row]
        _draw_image(first, image)
        first.set_title(shown.class_names[label], fontsize=10)
        for axes, maps in zip(others, shown.columns.values(), strict=True):
            _draw_image(axes, image)
            axes.imshow(maps.maps[row], cmap="turbo", vmin=0, vmax=1, alpha=0.5, interpolation="bilinear")
            predicted = maps.predicted[row]
            axes.set_title(f"{'✓' if predicted == label else '✗'} {shown.class_names[predicted]}", fontsize=10)
    for axes, name in zip(panels[0], ("image", *shown.columns), strict=True):
        axes.set_title(f"{name}\n{axes.get_title()}", fontsize=10)
    figure.suptitle(textwrap.fill(shown.caption, int(LETTERS * SIDE * columns)), fontsize=9)
    return png(figure)


def _draw_image(axes: Axes, image: Tensor) -> None:
    pixels = image.permute(1, 2, 0) if len(image) == 3 else image.float().mean(0)
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0)
    axes.set_axis_off()
