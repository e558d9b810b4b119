"""The ops, one file each: schema, fake, dispatch to a backend, autograd Function."""

from tde_kernels.ops.background_exempt import background_exempt
from tde_kernels.ops.effects import effects
from tde_kernels.ops.ema import feature_sum, fold_ema_
from tde_kernels.ops.logits import logits

__all__ = ["background_exempt", "effects", "feature_sum", "fold_ema_", "logits"]
