"""``tde::alpha_sweep``: the predicted class of Eq. 8 for many alphas, from one product (the paper's Figure 4).

argmax_i (total_bi - alpha * shift_bi) for every alpha, ties to the lowest class. It has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import define


def _fake(x: Tensor, w: Tensor, class_scale: Tensor | None, direction: Tensor, alphas: Tensor, **_: Any) -> Tensor:
    return x.new_empty((alphas.shape[0], x.shape[0]), dtype=torch.int64)


define(
    "alpha_sweep(Tensor x, Tensor w, Tensor? class_scale, Tensor direction, Tensor alphas, *, int num_heads, "
    "float scale, float[] feature_factor, float[] weight_factor, str backend) -> Tensor",
    fake=_fake,
)


def alpha_sweep(
    x: Tensor, w: Tensor, direction: Tensor, alphas: Tensor, classifier: Classifier, *, backend: str
) -> Tensor:
    """Classes int64 ``[A, B]`` of ``x [B, D]`` for ``alphas [A]``, from a product in float32."""
    result: Tensor = torch.ops.tde.alpha_sweep(
        x,
        w,
        classifier.class_scale,
        direction,
        alphas,
        num_heads=classifier.num_heads,
        scale=classifier.scale,
        feature_factor=classifier.normalizer.feature,
        weight_factor=classifier.normalizer.weight,
        backend=backend,
    )
    return result
