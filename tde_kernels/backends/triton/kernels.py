"""What the backend serves, under the names of the ops."""

from tde_kernels.backends.triton.alpha_sweep import alpha_sweep
from tde_kernels.backends.triton.background_exempt import background_exempt
from tde_kernels.backends.triton.ema import feature_sum, fold_ema_, update_ema_
from tde_kernels.backends.triton.logits import logits, saves
from tde_kernels.backends.triton.logits_backward import logits_backward
from tde_kernels.backends.triton.topk import topk

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
