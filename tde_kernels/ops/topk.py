"""``tde::topk``: the largest logits of Eq. 7 or Eq. 8 and their classes, ties to the lowest class. No gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import define


def _fake(x: Tensor, w: Tensor, *_: Tensor | None, k: int, dtype: torch.dtype, **__: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k), dtype=dtype), x.new_empty((x.shape[0], k), dtype=torch.int64)


define(
    "topk(Tensor x, Tensor w, Tensor? class_scale, Tensor? direction, Tensor? alpha, *, int k, int num_heads, "
    "float scale, float[] feature_factor, float[] weight_factor, ScalarType dtype, str backend) "
    "-> (Tensor values, Tensor classes)",
    fake=_fake,
)


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
    values, classes = torch.ops.tde.topk(
        x,
        w,
        classifier.class_scale,
        direction,
        alpha,
        k=k,
        num_heads=classifier.num_heads,
        scale=classifier.scale,
        feature_factor=classifier.normalizer.feature,
        weight_factor=classifier.normalizer.weight,
        dtype=dtype,
        backend=backend,
    )
    return values, classes
