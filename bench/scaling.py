"""How cost grows: a line through the log-log points of one axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bench.results import Row
from bench.shapes import SCALING

POINTS = 3  # the largest alone: below them a call's overhead is most of the time


class Fit(NamedTuple):
    """``seconds ~ size ** exponent`` between two sizes."""

    axis: str
    rival: str
    smallest: int
    largest: int
    exponent: float


def along(rows: Sequence[Row], axis: str, rival: str) -> list[tuple[int, Row]]:
    """The sizes of an axis and the rival's rows there, ascending."""
    found = {row.shape: row for row in rows if row.rival == rival and row.dtype == "float32"}
    sizes = ((getattr(shape, axis), found.get(name)) for name, shape in SCALING[axis].items())
    return [(size, row) for size, row in sizes if row is not None]


def fit(rows: Sequence[Row], axis: str, rival: str) -> Fit | None:
    """The exponent over the largest sizes, where there are enough."""
    points = along(rows, axis, rival)[-POINTS:]
    if len(points) < POINTS:
        return None
    sizes, seconds = np.array([(size, row.seconds) for size, row in points]).T
    exponent, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return Fit(axis, rival, points[0][0], points[-1][0], float(exponent))
