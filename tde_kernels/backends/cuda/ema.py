"""The EMA of the head direction: alone in one launch, or in two halves with a reduction over ranks in between."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.cuda.device import scratch, stream_of
from tde_kernels.backends.grouped import Intake


def ema_update(intake: Intake, sums: Tensor) -> object:
    """What a kernel that sums features is told, as the core sees it; ``sums`` is ``[D + 1]`` or empty."""
    addresses = map(core.address, (intake.ema, intake.num_updates, intake.mask))
    return core.compiled().EmaUpdate(*addresses, intake.momentum, core.address(sums if intake.take_sum else None))


def take_in(x: Tensor, intake: Intake, sums: Tensor) -> None:
    """Does with ``x [B, D]`` what the intake asks for; ``sums [D + 1]`` is empty where no sum is: one launch."""
    if x.shape[0] == 0:  # the sum of nothing; an EMA stays what it is
        sums.zero_()
        return
    x = core.dense_rows(x)
    features = core.matrix(x)
    floats, counters = scratch(x, core.compiled().cuda_update_ema_scratch(features))
    update = ema_update(intake, sums)
    core.mark_written(intake.ema, intake.num_updates)
    with stream_of(x) as stream:
        core.compiled().cuda_update_ema(features, update, floats.data_ptr(), counters.data_ptr(), stream)


def update_ema_(ema: Tensor, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, *, momentum: float) -> None:
    """See ``tde::update_ema_``."""
    take_in(x, Intake(mask, ema, num_updates, momentum), x.new_empty(0, dtype=torch.float32))


def feature_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``tde::feature_sum``."""
    sums = x.new_empty(x.shape[1] + 1, dtype=torch.float32)
    take_in(x, Intake(mask, take_sum=True), sums)
    return sums


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float) -> None:
    """See ``tde::fold_ema_``."""
    core.mark_written(ema, num_updates)
    with stream_of(ema) as stream:
        core.compiled().cuda_fold_ema(
            ema.data_ptr(), core.address(num_updates), total.data_ptr(), ema.shape[0], momentum, stream
        )
