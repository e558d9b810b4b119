"""``tde::background_exempt``: Eq. 9 for inference. It has no gradient; the reference serves where one is asked for.

P_0 = p_0,   P_i = (1 - p_0) q_i / (1 - q_0),   p = softmax(Eq. 7), q = softmax(Eq. 8)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import define


def _fake(x: Tensor, w: Tensor, *_: Tensor | None, dtype: torch.dtype, **__: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)


define(
    "background_exempt(Tensor x, Tensor w, Tensor? class_scale, Tensor direction, Tensor alpha, *, int num_heads, "
    "float scale, float[] feature_factor, float[] weight_factor, int background, bool log, ScalarType dtype, "
    "str backend) -> Tensor",
    fake=_fake,
)


def background_exempt(
    x: Tensor,
    w: Tensor,
    classifier: Classifier,
    *,
    direction: Tensor,
    alpha: Tensor,
    background: int,
    log: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Probabilities of Eq. 9, or their logarithms, ``[B, C]`` in ``dtype``, of ``x [B, D]``."""
    result: Tensor = torch.ops.tde.background_exempt(
        x,
        w,
        classifier.class_scale,
        direction,
        alpha,
        num_heads=classifier.num_heads,
        scale=classifier.scale,
        feature_factor=classifier.normalizer.feature,
        weight_factor=classifier.normalizer.weight,
        background=background,
        log=log,
        dtype=dtype,
        backend=backend,
    )
    return result
