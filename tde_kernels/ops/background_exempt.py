"""``tde::background_exempt``: Eq. 9 for inference. It has no gradient; the reference serves where one is asked for.

P_0 = p_0,   P_i = (1 - p_0) q_i / (1 - q_0),   p = softmax(Eq. 7), q = softmax(Eq. 8)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends.grouped import Grouped
from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import define_grouped


def _fake(p: Grouped, *, dtype: torch.dtype, **_: Any) -> Tensor:
    return p.x.new_empty((p.x.shape[0], p.w.shape[0]), dtype=dtype)


_run = define_grouped("background_exempt", "", ", int background, bool log, ScalarType dtype", "Tensor", fake=_fake)


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
    p = Grouped.of(x, w, classifier, direction, alpha)
    result: Tensor = _run(p, background=background, log=log, dtype=dtype, backend=backend)
    return result
