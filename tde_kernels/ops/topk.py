"""``tde::topk``: the largest logits of Eq. 7 or Eq. 8 and their classes, ties to the lowest class. No gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends.grouped import Grouped
from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import define_grouped


def _fake(p: Grouped, *, k: int, dtype: torch.dtype, **_: Any) -> tuple[Tensor, Tensor]:
    shape = p.x.shape[0], k
    return p.x.new_empty(shape, dtype=dtype), p.x.new_empty(shape, dtype=torch.int64)


_run = define_grouped("topk", "", ", int k, ScalarType dtype", "(Tensor values, Tensor classes)", fake=_fake)


def topk(
    x: Tensor,
    w: Tensor,
    classifier: Classifier,
    k: int,
    *,
    direction: Tensor | None,
    alpha: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Values in ``dtype`` and classes int64, both ``[B, k]``, of ``x [B, D]``, in descending order."""
    p = Grouped.of(x, w, classifier, direction, alpha)
    values, classes = _run(p, k=k, dtype=dtype, backend=backend)
    return values, classes
