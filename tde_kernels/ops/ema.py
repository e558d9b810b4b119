"""``tde::update_ema_``, the EMA of Assumption 1; and in two steps, a sum over ranks in between: ``tde::feature_sum``,
``tde::fold_ema_``.

ema <- momentum * ema + mean of the rows where the mask holds
"""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.ops.library import define


def _sum_fake(x: Tensor, mask: Tensor | None, *, backend: str) -> Tensor:
    return x.new_empty(x.shape[1] + 1, dtype=torch.float32)


def _update_fake(
    ema: Tensor, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, *, momentum: float, backend: str
) -> None:
    return None


def _fold_fake(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float, backend: str) -> None:
    return None


_update = define(
    "update_ema_(Tensor(a!) ema, Tensor(b!)? num_updates, Tensor x, Tensor? mask, *, float momentum, str backend) "
    "-> ()",
    fake=_update_fake,
)
_sum = define("feature_sum(Tensor x, Tensor? mask, *, str backend) -> Tensor", fake=_sum_fake)
_fold = define(
    "fold_ema_(Tensor(a!) ema, Tensor(b!)? num_updates, Tensor total, *, float momentum, str backend) -> ()",
    fake=_fold_fake,
)


def update_ema_(
    ema: Tensor, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, *, momentum: float, backend: str
) -> None:
    """Takes the rows of ``x [B, D]`` where ``mask [B]`` holds into ``ema [D]``; counts an update if there are any."""
    _update(ema, num_updates, x, mask, momentum=momentum, backend=backend)


def feature_sum(x: Tensor, mask: Tensor | None, *, backend: str) -> Tensor:
    """``[D + 1]`` float32: the sum of the rows of ``x [B, D]`` that ``mask [B]`` lets through, then their number."""
    result: Tensor = _sum(x, mask, backend=backend)
    return result


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float, backend: str) -> None:
    """Folds a feature sum into ``ema [D]`` in place and counts one more update; nothing where the sum has no rows."""
    _fold(ema, num_updates, total, momentum=momentum, backend=backend)
