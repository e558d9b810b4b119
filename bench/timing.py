"""Timing on a machine that others use too: the variants take turns, and the figure is the median of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_TURNS, MOST_TURNS = 3, 1000


class Timed(NamedTuple):
    """Median seconds of a call, median of the ratios to the limit, and of how many turns."""

    seconds: float
    ratio: float
    turns: int


def on_cpu(run: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@cache
def _beyond_the_cache() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def on_cuda(run: Callable[[], object]) -> float:
    """Seconds of one call on the device, the second-level cache emptied before and the queue kept full."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _beyond_the_cache().zero_()
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the launches queue up
    begin.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3


CLOCKS = {"cpu": on_cpu, "cuda": on_cuda}


def against(run: Callable[[], object], limit: Callable[[], object], device: str, budget: float) -> Timed:
    """``run`` and ``limit`` in turns of one each, for ``budget`` seconds or, if that is more, a few turns.

    Both have been called before, so that nothing is compiled or allocated for the first time.
    """
    clock, pairs = CLOCKS[device], list[tuple[float, float]]()
    until = time.monotonic() + budget
    while len(pairs) < LEAST_TURNS or (time.monotonic() < until and len(pairs) < MOST_TURNS):
        pairs.append((clock(run), clock(limit)))
    seconds = statistics.median(ours for ours, _ in pairs)
    return Timed(seconds, statistics.median(ours / bound for ours, bound in pairs), len(pairs))
