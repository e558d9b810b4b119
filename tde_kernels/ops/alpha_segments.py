"""``tde::alpha_segments``: the predicted class of Eq. 8 for every alpha at once, as segments. No gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends.grouped import Grouped
from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import define_grouped


def _fake(p: Grouped, *, most: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch = p.x.shape[0]
    return (
        p.x.new_empty((batch, most), dtype=torch.float64),
        p.x.new_empty((batch, most), dtype=torch.int64),
        p.x.new_empty(batch, dtype=torch.int64),
    )


_run = define_grouped("alpha_segments", "", ", int most", "(Tensor starts, Tensor classes, Tensor counts)", fake=_fake)


def alpha_segments(
    x: Tensor, w: Tensor, direction: Tensor, classifier: Classifier, most: int, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``starts`` float64 and ``classes``, both ``[B, most]``, and how many there are, ``counts [B]``."""
    p = Grouped.of(x, w, classifier, direction)
    starts, classes, counts = _run(p, most=most, backend=backend)
    return starts, classes, counts
