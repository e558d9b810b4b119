"""Eq. 8 for many alphas: the lines of some rows at a time, from one product in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tde_kernels import envelope, reference
from tde_kernels.backends.around_product import Passes, normalized
from tde_kernels.backends.grouped import Grouped


class Lines(NamedTuple):
    """The logits of Eq. 7 of some rows, and what one unit of alpha takes off them: ``along_x @ along_w``."""

    total: Tensor  # [R, C] float32
    along_x: Tensor  # [R, K]
    along_w: Tensor  # [K, C], contiguous


class SweepPasses(Passes, Protocol):
    """What is done with the lines, by default the reference's way."""

    workspace: int  # bytes of logits at a time

    def winners(self, lines: Lines, alphas: Tensor) -> Tensor:
        """Classes int64 ``[A, R]`` for float64 ``alphas [A]``, ties to the lowest."""
        return reference.winners(lines.total, lines.along_x, lines.along_w.t(), alphas)

    def segments(self, lines: Lines, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`tde_kernels.envelope.segments`."""
        return envelope.segments(lines.total, lines.along_x @ lines.along_w, most)


def _lines(passes: SweepPasses, p: Grouped) -> Iterator[tuple[slice, Lines]]:
    (x_hat, along_x), (w_hat, along_w) = (normalized(passes, rows, p) for rows in (p.features, p.weights))
    along_w = along_w.t().contiguous()
    rows = max(1, passes.workspace // (w_hat.shape[0] * w_hat.element_size()))
    for begin in range(0, x_hat.shape[0], rows):
        chunk = slice(begin, begin + rows)
        yield chunk, Lines(passes.product(x_hat[chunk], w_hat), along_x[chunk], along_w)


def alpha_sweep(passes: SweepPasses, p: Grouped, alphas: Tensor) -> Tensor:
    """See ``tde::alpha_sweep``."""
    found = p.x.new_empty((len(alphas), p.x.shape[0]), dtype=torch.int64)
    if found.numel():
        for chunk, lines in _lines(passes, p):
            found[:, chunk] = passes.winners(lines, alphas)
    return found


def alpha_segments(passes: SweepPasses, p: Grouped, *, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::alpha_segments``."""
    shape = p.x.shape[0], most
    starts, classes = (p.x.new_empty(shape, dtype=kind) for kind in (torch.float64, torch.int64))
    counts = p.x.new_empty(p.x.shape[0], dtype=torch.int64)
    for chunk, lines in _lines(passes, p):
        starts[chunk], classes[chunk], counts[chunk] = passes.segments(lines, most)
    return starts, classes, counts
