"""Eq. 9: a product in float32, then one launch for both softmaxes."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.cuda.device import stream_of
from tde_kernels.backends.cuda.logits import effects
from tde_kernels.backends.grouped import Grouped


def background_exempt(p: Grouped, *, background: int, log: bool, dtype: torch.dtype) -> Tensor:
    """See ``tde::background_exempt``. The product is taken in float32: a difference follows it."""
    z, along_x, along_w = effects(p)
    out = z if dtype == torch.float32 else torch.empty_like(z, dtype=dtype)
    with stream_of(z) as stream:
        core.compiled().cuda_background_exempt(
            core.matrix(z),
            along_x.data_ptr(),
            along_w.data_ptr(),
            p.heads,
            core.address(p.alpha),
            background,
            log,
            core.matrix(out),
            stream,
        )
    return out
