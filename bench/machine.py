"""What this machine can do at best, measured: the roof of its roofline."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from bench.products import LIBRARIES, Library
from bench.timing import CLOCKS

SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of square products
NUMBERS = 2**26  # of each vector of the triad, beyond any cache
_CALLS = 4


class Roof(NamedTuple):
    """Operations and bytes a second."""

    flops: float
    bytes: float

    def floor(self, flops: int, moved: int) -> float:
        """The least seconds that work of so many operations and bytes takes."""
        return max(flops / self.flops, moved / self.bytes)


@cache
def bandwidth(device: str) -> float:
    """Bytes a second of a triad, ``a = b + s * c``."""
    a, b, c = (torch.ones(NUMBERS, device=device) for _ in range(3))
    best = min(CLOCKS[device](lambda: torch.add(b, c, alpha=2.0, out=a)) for _ in range(_CALLS))
    return (a.nbytes + b.nbytes + c.nbytes) / best


@cache
def roof(device: str, dtype: torch.dtype) -> Roof:
    """By the best of the libraries' matrix products for operands in ``dtype``, and the triad."""

    def rate(library: Library, side: int) -> float:
        a, b = (torch.randn(side, side, device=device).to(library.kind(dtype)) for _ in range(2))
        return 2 * side**3 / min(CLOCKS[device](lambda: library.product(a, b)) for _ in range(_CALLS))

    best = max(rate(library, side) for library in LIBRARIES[device] for side in SIDES[device])
    return Roof(best, bandwidth(device))
