"""``tde::alpha_sweep``: the predicted class of Eq. 8 for many alphas, from one product (the paper's Figure 4).

argmax_i (total_bi - alpha * shift_bi) for every alpha, ties to the lowest class. It has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends.grouped import Grouped
from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import define_grouped


def _fake(p: Grouped, alphas: Tensor, **_: Any) -> Tensor:
    return p.x.new_empty((alphas.shape[0], p.x.shape[0]), dtype=torch.int64)


_run = define_grouped("alpha_sweep", ", Tensor alphas", "", "Tensor", fake=_fake)


def alpha_sweep(
    x: Tensor, w: Tensor, direction: Tensor, alphas: Tensor, classifier: Classifier, *, backend: str
) -> Tensor:
    """Classes int64 ``[A, B]`` of ``x [B, D]`` for ``alphas [A]``, from a product in float32."""
    p = Grouped.of(x, w, classifier, direction)
    result: Tensor = _run(p, alphas, backend=backend)
    return result
