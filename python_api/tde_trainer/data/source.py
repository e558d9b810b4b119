"""Where images come from before any is chosen: labels first, pixels when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tde_trainer.data.base import Images
from tde_trainer.errors import UserError


class Source(NamedTuple):
    """One split of a data set on disk."""

    labels: Tensor  # [N] int64
    class_names: tuple[str, ...]
    read: Callable[[Tensor], Images]  # of indices [n] int64; leaves out what is unreadable and to be skipped

    def counts(self) -> list[int]:
        """Samples of every class."""
        return torch.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def held_out(self, per_class: int, seed: int) -> tuple[Images, Images]:
        """``per_class`` random samples of every class, for validation, and all the others.

        Raises:
            UserError: there are no others.
        """
        least = min(self.counts())
        if per_class >= least:
            raise UserError(f"data.val_per_class={per_class} leaves none of a class of {least} test images")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator)
        order = order[self.labels[order].argsort(stable=True)]  # by class, shuffled within
        starts = torch.tensor([0, *self.counts()[:-1]]).cumsum(0)
        rank = torch.arange(len(order)) - starts[self.labels[order]]
        return self.read(order[rank < per_class]), self.read(order[rank >= per_class])
