"""The EMA of the head direction: alone in one launch, or in two halves with a reduction over ranks in between."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.cuda.device import scratch, stream_of


def ema_update(
    ema: Tensor | None, num_updates: Tensor | None, mask: Tensor | None, sums: Tensor | None, momentum: float
) -> object:
    """What a kernel that sums features is told, as the core sees it. The caller keeps the tensors alive."""
    return core.compiled().EmaUpdate(*map(core.address, (ema, num_updates, mask)), momentum, core.address(sums))


def take_in(
    ema: Tensor | None, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, sums: Tensor | None, momentum: float
) -> None:
    """Folds ``x [B, D]`` into ``ema [D]``, writes its feature sum to ``sums [D + 1]``, or both: one launch."""
    if x.shape[0] == 0:  # the sum of nothing; an EMA stays what it is
        if sums is not None:
            sums.zero_()
        return
    x = core.dense_rows(x)
    features = core.matrix(x)
    floats, counters = scratch(x, core.compiled().cuda_update_ema_scratch(features))
    update = ema_update(ema, num_updates, mask, sums, momentum)
    with stream_of(x) as stream:
        core.compiled().cuda_update_ema(features, update, floats.data_ptr(), counters.data_ptr(), stream)
    core.mark_written(ema, num_updates)


def update_ema_(ema: Tensor, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, *, momentum: float) -> None:
    """See ``tde::update_ema_``."""
    take_in(ema, num_updates, x, mask, None, momentum)


def feature_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``tde::feature_sum``."""
    sums = x.new_empty(x.shape[1] + 1, dtype=torch.float32)
    take_in(None, None, x, mask, sums, 0.0)
    return sums


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float) -> None:
    """See ``tde::fold_ema_``."""
    with stream_of(ema) as stream:
        core.compiled().cuda_fold_ema(
            ema.data_ptr(), core.address(num_updates), total.data_ptr(), ema.shape[0], momentum, stream
        )
    core.mark_written(ema, num_updates)
