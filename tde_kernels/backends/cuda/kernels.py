"""The ops of this backend, by the names that the dispatcher asks for."""

from __future__ import annotations

from functools import partial

from tde_kernels.backends import around_product
from tde_kernels.backends.cuda.background_exempt import background_exempt
from tde_kernels.backends.cuda.ema import feature_sum, fold_ema_, update_ema_
from tde_kernels.backends.cuda.logits import logits, logits_backward, saves
from tde_kernels.backends.cuda.rows import PASSES

alpha_sweep = partial(around_product.alpha_sweep, PASSES)
topk = partial(around_product.topk, PASSES)

__all__ = [
    "alpha_sweep",
    "background_exempt",
    "feature_sum",
    "fold_ema_",
    "logits",
    "logits_backward",
    "saves",
    "topk",
    "update_ema_",
]
