"""Pictures of coloured shapes before a textured background, with the outline of every shape."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, product

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float64]
Outline = list[Array]  # contours [V, 2] of x and y; the first is the border, any other a hole

DIAMETERS = (14 / 128, 48 / 128)  # of the circle around a shape, in sides of the image
HIDDEN = 0.1  # at most this part of a shape's box lies in another's
SUPERSAMPLED = 4
HUES = {"red": 0.98, "orange": 0.035, "yellow": 0.09}  # so near that some of each could be of the next
HUE_JITTER = 0.04


def _polar(angles: Array, radii: Array | float = 1.0) -> Array:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _turn(vertices: int) -> Array:
    return np.linspace(0, 2 * np.pi, vertices, endpoint=False)


def _cross(half_width: float) -> Array:
    length = (1 - half_width**2) ** 0.5
    arm = np.array([[length, -half_width], [length, half_width], [half_width, half_width]])
    quarter = np.array([[0.0, 1.0], [-1.0, 0.0]])  # turns (x, y) into (-y, x)
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, k) for k in range(4)])


def _crescent(centre: float, radius: float) -> Array:
    """The unit disc without the disc around ``(centre, 0)``."""
    x = (1 - radius**2 + centre**2) / (2 * centre)  # where the two circles meet
    outer, inner = np.arccos(x), np.arccos((x - centre) / radius)
    bite = _polar(np.linspace(2 * np.pi - inner, inner, 24)[1:-1], radius) + np.array([centre, 0])
    return np.concatenate([_polar(np.linspace(outer, 2 * np.pi - outer, 32)), bite])


# Within the unit circle. Neighbours in this list look alike.
SHAPES: dict[str, Outline] = {
    "triangle": [_polar(_turn(3))],
    "square": [_polar(_turn(4))],
    "pentagon": [_polar(_turn(5))],
    "hexagon": [_polar(_turn(6))],
    "disc": [_polar(_turn(40))],
    "ring": [_polar(_turn(40)), _polar(_turn(40), 0.5)],
    "crescent": [_crescent(0.5, 0.8)],
    "ellipse": [_polar(_turn(40)) * [1, 0.6]],
    "cross": [_cross(0.3)],
    "star": [_polar(_turn(10), np.tile([1.0, 0.45], 5))],
}
KINDS = [f"{hue}_{shape}" for hue, shape in product(HUES, SHAPES)]


@dataclass(frozen=True)
class Scene:
    """An image ``[side, side, 3]`` uint8, and the outlines of its shapes in pixels from the upper left corner."""

    image: NDArray[np.uint8]
    outlines: list[Outline]


def draw_scene(kinds: Sequence[str], side: int, rng: Generator) -> Scene:
    """Shapes of `KINDS`, each wholly inside the image; a later one may hide a little of an earlier one.

    Place, size, angle and shade are random, the background is `_background`.
    """
    image = _background(side, rng)
    outlines = _place([SHAPES[kind.split("_")[1]] for kind in kinds], side, rng)
    for kind, outline in zip(kinds, outlines, strict=True):
        hue = HUES[kind.split("_")[0]] + rng.uniform(-HUE_JITTER, HUE_JITTER)
        _paint(image, coverage(outline, side), hue, rng)
    image += rng.normal(0, 0.02, image.shape)
    return Scene((255 * image.clip(0, 1)).round().astype(np.uint8), outlines)


def coverage(outline: Outline, side: int) -> Array:
    """How much of every pixel an outline covers, ``[side, side]`` in 0 .. 1."""
    canvas = Image.new("L", (SUPERSAMPLED * side, SUPERSAMPLED * side))
    pencil = ImageDraw.Draw(canvas)
    for contour, ink in zip(outline, (255, *[0] * len(outline)), strict=False):
        pencil.polygon((contour * SUPERSAMPLED - 0.5).ravel().tolist(), fill=ink)  # PIL's pixel 0 has its middle at 0
    return np.asarray(canvas.reduce(SUPERSAMPLED), dtype=np.float64) / 255


def box(outline: Outline) -> Array:
    """Left, upper, right and lower edge of the border, ``[4]``."""
    return np.concatenate([outline[0].min(0), outline[0].max(0)])


def _place(outlines: Sequence[Outline], side: int, rng: Generator) -> list[Outline]:
    placed: list[Outline] = []
    for attempt in count(1):
        if len(placed) == len(outlines):
            break
        if attempt % 100 == 0:  # those placed so far leave no room
            placed.clear()
        radius, angle = side * rng.uniform(*DIAMETERS) / 2, rng.uniform(0, 2 * np.pi)
        cos, sin = radius * np.cos(angle), radius * np.sin(angle)
        centre = rng.uniform(radius, side - radius, 2)
        outline = [contour @ np.array([[cos, sin], [-sin, cos]]) + centre for contour in outlines[len(placed)]]
        if all(_hidden(box(outline), box(other)) <= HIDDEN for other in placed):
            placed.append(outline)
    return placed


def _hidden(one: Array, other: Array) -> float:
    """The intersection of two boxes, as a part of the smaller one."""
    common = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    return float(common.clip(0).prod() / min((b[2:] - b[:2]).prod() for b in (one, other)))


def _paint(image: Array, cover: Array, hue: float, rng: Generator) -> None:
    colour = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.65, 0.95), rng.uniform(0.65, 0.95))
    shade = 1 + 0.15 * _noise(len(image), (4, 16), rng)  # no shape is quite of one colour
    image += cover[:, :, None] * (np.array(colour) * shade[:, :, None] - image)


def _noise(side: int, octaves: Sequence[int], rng: Generator) -> Array:
    """Smooth noise ``[side, side]`` about 0: a grid of random values for each octave, the finer the weaker."""
    total = np.zeros((side, side))
    for cells in octaves:
        grid = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
        total += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) * (octaves[0] / cells) ** 0.5
    return total


def _background(side: int, rng: Generator) -> Array:
    """Tinted noise with strokes and specks on it, some of them of the shapes' colours: what is no object."""
    tint, slope = rng.uniform(0.2, 0.7, 3), rng.normal(0, 0.07, (2, 3))
    waves = np.stack([_noise(side, (3, 6, 12, 24), rng) for _ in slope], 2)
    image = Image.fromarray((255 * (tint + waves @ slope).clip(0, 1)).astype(np.uint8))
    pencil = ImageDraw.Draw(image)
    unit = side / 128
    for _ in range(rng.integers(4, 10)):
        hue, thin = rng.choice([rng.uniform(), rng.choice(list(HUES.values()))]), rng.uniform() < 0.6
        colour = tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue, *rng.uniform(0.4, 0.9, 2)))
        start = rng.uniform(0, side, 2)
        end = start + (rng.normal(0, 30 * unit, 2) if thin else rng.uniform(2 * unit, 7 * unit, 2))
        if thin:
            pencil.line([*start, *end], fill=colour, width=max(1, round(rng.uniform(0.5, 2.5) * unit)))
        else:
            pencil.ellipse([*start, *end], fill=colour)
    return np.asarray(image, dtype=np.float64) / 255
