"""What the backend serves, under the names of the ops."""

from functools import partial

from tde_kernels.backends import around_product, sweep
from tde_kernels.backends.fused_loss import FusedLoss
from tde_kernels.backends.triton.alpha_sweep import alpha_sweep
from tde_kernels.backends.triton.background_exempt import background_exempt
from tde_kernels.backends.triton.ema import feature_sum, fold_ema_, update_ema_
from tde_kernels.backends.triton.logits import logits, saves
from tde_kernels.backends.triton.logits_backward import logits_backward
from tde_kernels.backends.triton.rows import PASSES
from tde_kernels.backends.triton.topk import topk

head_direction = partial(around_product.head_direction, PASSES)
alpha_segments = partial(sweep.alpha_segments, PASSES)
LOSS = FusedLoss(PASSES, logits, logits_backward)
taken_along = LOSS.taken_along
cross_entropy = LOSS.forward
cross_entropy_backward = LOSS.backward
cross_entropy_sums = LOSS.sums
cross_entropy_losses = LOSS.losses

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
