"""The ops, one file each: schema, fake, dispatch to a backend, autograd Function."""

from tde_kernels.ops.alpha_segments import alpha_segments
from tde_kernels.ops.alpha_sweep import alpha_sweep
from tde_kernels.ops.background_exempt import background_exempt
from tde_kernels.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_gradients,
    cross_entropy_losses,
    cross_entropy_sums,
)
from tde_kernels.ops.ema import feature_sum, fold_ema_, update_ema_
from tde_kernels.ops.head_direction import head_direction
from tde_kernels.ops.logits import logits
from tde_kernels.ops.topk import topk

__all__ = [
    "alpha_segments",
    "alpha_sweep",
    "background_exempt",
    "cross_entropy",
    "cross_entropy_gradients",
    "cross_entropy_losses",
    "cross_entropy_sums",
    "feature_sum",
    "fold_ema_",
    "head_direction",
    "logits",
    "topk",
    "update_ema_",
]
