"""Work on some classes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from tde_kernels.backends.grouped import Grouped, Rows

_MULTIPLE = 64  # classes: their logits then start on whole cache lines


def class_chunks(p: Grouped, dtype: torch.dtype, workspace: int) -> Iterator[slice]:
    """Classes whose logits and scaled weights fit in ``workspace`` bytes together."""
    classes = p.w.shape[0]
    most = workspace // ((p.x.shape[0] + p.x.shape[1]) * dtype.itemsize)
    step = max(1, most - most % _MULTIPLE if most > _MULTIPLE else most)
    for begin in range(0, classes, step):
        yield slice(begin, min(begin + step, classes))


def some_classes(weights: Rows, chunk: slice) -> Rows:
    """The rows of those classes."""
    return replace(weights, a=weights.a[chunk], divisor=None if weights.divisor is None else weights.divisor[chunk])
