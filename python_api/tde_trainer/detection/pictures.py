"""A figure of detections: a row for each image, a column for the truth and for each way of detecting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from tde_trainer.plots import COLOURS

FREQUENCY_COLOURS = dict(zip("fcr", COLOURS, strict=False))
FREQUENCY_NAMES = {"f": "frequent", "c": "common", "r": "rare"}
SIDE = 3.6  # inches of an image
FONT = 8.5  # points
OVERLAP = 0.5  # IoU from which a detection of the right class is right

LineStyle = Literal["-"] | tuple[float, Sequence[float]]
SOLID: LineStyle = "-"
DASHED: LineStyle = (0, (3, 2))

Box = tuple[float, float, float, float]  # left, upper, right, lower
Detections = Mapping[str, Tensor]
"""What a torchvision detector says of an image: ``boxes [N, 4]`` in pixels from the upper left corner, ``x1, y1, x2,
y2``; ``labels [N]`` from 1; ``scores [N]``, which the truth lacks; ``masks [N, 1, H, W]`` or ``[N, H, W]`` in 0 .. 1,
where there are any."""


@dataclass(frozen=True)
class Row:
    """An image, what it shows, and what was detected in it."""

    image: Tensor  # [3, H, W] uint8
    truth: Detections
    columns: Mapping[str, Detections]  # by title, the same ones in every row


@dataclass(frozen=True)
class Classes:
    """Label l is the class at place ``l - 1``."""

    names: Sequence[str]  # [C]
    frequencies: Sequence[str]  # [C], r, c or f, as `frequency_groups` gives them

    def name(self, label: int) -> str:
        return self.names[label - 1].replace("_", " ")

    def colour(self, label: int) -> str:
        return FREQUENCY_COLOURS[self.frequencies[label - 1]]


def draw_detections(rows: Sequence[Row], classes: Classes, *, threshold: float = 0.5) -> Figure:
    """Each image with its truth, then with what each column detects with a score of ``threshold`` or more.

    Colours tell how frequent a class is in training. A box is solid where it is right: it overlaps a true one of its
    class with an IoU of 0.5 or more. Others are dashed.

    Raises:
        ValueError: there is no row, or rows differ in their columns.
    """
    titles = list(rows[0].columns) if rows else []
    if not rows or any(list(row.columns) != titles for row in rows):
        raise ValueError(f"wanted are rows of the same columns, got {[list(row.columns) for row in rows]}")
    figure = Figure(figsize=(SIDE * (1 + len(titles)), SIDE * len(rows) + 0.9), dpi=130, layout="compressed")
    for panels, row in zip(figure.subplots(len(rows), 1 + len(titles), squeeze=False), rows, strict=True):
        truth, *others = panels
        _draw(truth, row.image, row.truth, classes, None)
        for axes, detections in zip(others, row.columns.values(), strict=True):
            kept = detections["scores"] >= threshold
            shown = {name: value[kept].cpu() for name, value in detections.items()}
            _draw(axes, row.image, shown, classes, is_right(shown, row.truth).tolist())
    for axes, title in zip(figure.axes[: 1 + len(titles)], ("ground truth", *titles), strict=True):
        axes.set_title(title, fontsize=13)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=5, frameon=False, fontsize=11)
    return figure


def is_right(detections: Detections, truth: Detections) -> Tensor:
    """Whether a true box of the same class is where a detection is, ``[N]`` bool: IoU of 0.5 or more."""
    boxes, labels = truth["boxes"].cpu(), truth["labels"].cpu()
    overlaps = box_iou(detections["boxes"], boxes) >= OVERLAP
    right: Tensor = (overlaps & (detections["labels"][:, None] == labels)).any(1)
    return right


def _draw(axes: Axes, image: Tensor, shown: Detections, classes: Classes, right: Sequence[bool] | None) -> None:
    """The boxes of one panel, the surest on top; ``right`` is None for the truth."""
    height, width = image.shape[-2:]
    # matplotlib's first pixel is centred at 0, a detector's reaches from 0 to 1
    axes.imshow(image.cpu().permute(1, 2, 0).numpy(), interpolation="bicubic", extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)  # whatever sticks out of the image
    axes.set_axis_off()
    labels, boxes = shown["labels"].tolist(), shown["boxes"].tolist()
    order = list(range(len(labels))) if right is None else shown["scores"].argsort().tolist()
    taken: list[Box] = []
    for index in order:
        colour, style, text = classes.colour(labels[index]), SOLID, classes.name(labels[index])
        if right is not None:
            style = SOLID if right[index] else DASHED
            text = f"{'✓' if right[index] else '✗'} {text} {shown['scores'][index]:.2f}"
        if "masks" in shown:
            _draw_mask(axes, shown["masks"][index].cpu().float().reshape(height, width).numpy(), colour)
        _draw_box(axes, boxes[index], colour, style)
        unit = width / SIDE / 72  # a point
        size = (unit * FONT * (0.62 * len(text) + 1), unit * 1.5 * FONT)
        taken.append(_free_place(boxes[index], size, (width, height), taken))
        axes.text(
            taken[-1][0] + 0.2 * FONT * unit,
            (taken[-1][1] + taken[-1][3]) / 2,
            text,
            va="center_baseline",
            fontsize=FONT,
            color="white",
            bbox={"facecolor": colour, "edgecolor": "none", "alpha": 0.85, "pad": 1.2},
        )


def _draw_mask(axes: Axes, mask: NDArray[np.float32], colour: str) -> None:
    """Its border, and a tint so faint that one still sees the object's own colour."""
    height, width = mask.shape
    inside = mask > 0.5
    layer = np.zeros((height, width, 4))
    layer[inside] = (*to_rgb(colour), 0.2)
    axes.imshow(layer, interpolation="nearest", extent=(0, width, height, 0))
    if inside.any() and not inside.all():
        axes.contour(np.arange(width) + 0.5, np.arange(height) + 0.5, mask, [0.5], colors=colour, linewidths=1.3)


def _draw_box(axes: Axes, box: Sequence[float], colour: str, style: LineStyle) -> None:
    left, upper, right, lower = box
    edge = Rectangle(
        (left, upper), right - left, lower - upper, fill=False, edgecolor=colour, linewidth=1.8, linestyle=style
    )
    edge.set_path_effects([patheffects.withStroke(linewidth=3.2, foreground="white", alpha=0.7)])
    axes.add_patch(edge)


def _free_place(box: Sequence[float], size: tuple[float, float], image: tuple[float, float], taken: list[Box]) -> Box:
    """Where a label of that size hides no other, wholly inside the image: over its box, below it, or within."""
    (left, upper, _, lower), (width, height) = box, size
    x = min(max(left, 0.0), image[0] - width)
    ys = [min(max(y, 0.0), image[1] - height) for y in (upper - height, lower, upper, lower - height)]
    places = [(x, y, x + width, y + height) for y in ys]
    return next((place for place in places if not any(_meet(place, other) for other in taken)), places[0])


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend() -> list[Patch | Line2D]:
    colours = [
        Patch(color=colour, label=f"{FREQUENCY_NAMES[frequency]} in training")
        for frequency, colour in FREQUENCY_COLOURS.items()
    ]
    right = Line2D([], [], color="#333", linewidth=1.8, label="✓ right class and place")
    wrong = Line2D([], [], color="#333", linewidth=1.8, linestyle=DASHED, label="✗ wrong")
    return [*colours, right, wrong]
