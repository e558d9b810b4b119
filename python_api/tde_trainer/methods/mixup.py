"""Mixup: convex combinations of pairs of images, and of their losses, by one draw from ``Beta(a, a)`` a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta

from tde_trainer.methods.base import Batch, Draw, Stage
from tde_trainer.methods.linear import Linear


class Mixup(Linear):
    """Each image with another of its own batch."""

    def compose(self, images: Tensor, target: Tensor, stage: Stage, draw: Draw) -> Batch:
        """See `Method.compose`."""
        a = images.new_full((), stage.config.mixup_alpha)
        lam = Beta(a, a, validate_args=False).sample()
        other = torch.randperm(len(images), device=images.device)
        return Batch(lam * images + (1 - lam) * images[other], target, target[other], lam)
