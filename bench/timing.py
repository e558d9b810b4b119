"""Timing on a machine that others use too: the variants take turns, and the figure is the median of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(run: Callable[[], object], limit: Callable[[], object], budget: float = 4.0) -> tuple[float, int]:
    """Median of ``time(run) / time(limit)`` over turns of one each, for ``budget`` seconds, and how many turns it took.

    Both have been called before, so that nothing is compiled or allocated for the first time.
    """
    ratios: list[float] = []
    spent = 0.0
    while len(ratios) < 5 or (spent < budget and len(ratios) < 1000):
        ours, bound = seconds(run), seconds(limit)
        ratios.append(ours / bound)
        spent += ours + bound
    return statistics.median(ratios), len(ratios)
