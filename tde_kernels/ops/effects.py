"""``tde::effects``: the logits of Eq. 7 in float32 beside the operands' projections on the head direction.

    z_bi(alpha) = total_bi - alpha sum_k along_x_bk along_w_ik,

so that a sweep over alpha (the paper's Figure 4) takes one product. For inference: it has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import define


def _fake(x: Tensor, w: Tensor, *_: Tensor | None, num_heads: int, **__: Any) -> tuple[Tensor, ...]:
    sizes = ((x.shape[0], w.shape[0]), (x.shape[0], num_heads), (w.shape[0], num_heads))
    return tuple(x.new_empty(size, dtype=torch.float32) for size in sizes)


define(
    "effects(Tensor x, Tensor w, Tensor? class_scale, Tensor direction, *, int num_heads, float scale, "
    "float[] feature_factor, float[] weight_factor, str backend) -> (Tensor total, Tensor along_x, Tensor along_w)",
    fake=_fake,
)


def effects(
    x: Tensor, w: Tensor, direction: Tensor, classifier: Classifier, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Total effect ``[B, C]``, projections ``[B, K]`` and ``[C, K]`` of ``x [B, D]`` and ``w [C, D]``, float32."""
    total, along_x, along_w = torch.ops.tde.effects(
        x,
        w,
        classifier.class_scale,
        direction,
        num_heads=classifier.num_heads,
        scale=classifier.scale,
        feature_factor=classifier.normalizer.feature,
        weight_factor=classifier.normalizer.weight,
        backend=backend,
    )
    return total, along_x, along_w
