"""The ops of this backend, by the names that the dispatcher asks for."""

from __future__ import annotations

from functools import partial

from tde_kernels.backends import around_product, largest, sweep
from tde_kernels.backends.cuda.background_exempt import background_exempt
from tde_kernels.backends.cuda.ema import feature_sum, fold_ema_, update_ema_
from tde_kernels.backends.cuda.logits import logits, logits_backward, saves
from tde_kernels.backends.cuda.rows import PASSES
from tde_kernels.backends.fused_loss import FusedLoss

LOSS = FusedLoss(PASSES, logits, logits_backward)
taken_along = LOSS.taken_along
cross_entropy = LOSS.forward
cross_entropy_backward = LOSS.backward
cross_entropy_sums = LOSS.sums
cross_entropy_losses = LOSS.losses
head_direction = partial(around_product.head_direction, PASSES)
alpha_sweep = partial(sweep.alpha_sweep, PASSES)
alpha_segments = partial(sweep.alpha_segments, PASSES)
topk = partial(largest.topk, PASSES, logits)

__all__ = [
    "LOSS",
    "PASSES",
    "alpha_segments",
    "alpha_sweep",
    "background_exempt",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_losses",
    "cross_entropy_sums",
    "feature_sum",
    "fold_ema_",
    "head_direction",
    "logits",
    "logits_backward",
    "saves",
    "taken_along",
    "topk",
    "update_ema_",
]
