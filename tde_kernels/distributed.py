"""The one collective the head needs: sum and count of the features over all ranks, in one message."""

from __future__ import annotations

import torch
from torch import Tensor


def active() -> bool:
    """Whether there are ranks to reduce over."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reduce_sum(total: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """``total`` summed over the ranks of ``group`` (default: all), in place; itself where there is one process."""
    if active():
        torch.distributed.all_reduce(total, group=group)
    return total
