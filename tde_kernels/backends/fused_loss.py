"""Cross entropy in a bounded workspace: logits are stored whole where they fit in it, else some at a time.

Three ways, by size (see :meth:`FusedLoss.way`):

- **whole**: the backend's own logits, one pass that puts their gradient in their place, the backend's own gradients;
- **rows**: the same for some rows at a time, of operands that are scaled once: three products for a training step;
- **classes**: some classes at a time, and again for the gradients: four products, and no memory but the workspace and
  :data:`SUMS` numbers a row.

The first two take the gradients along in the forward, where one number is upstream of all losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends import core, loss_by_classes, loss_by_rows
from tde_kernels.backends.core import Kept
from tde_kernels.backends.grouped import NOTHING, Grouped, Intake, Loss, LossPass, Wants
from tde_kernels.backends.loss_passes import SUMS, LossPasses


def _floats(p: Grouped, *shape: int) -> Tensor:
    return p.x.new_empty(shape, dtype=torch.float32)


@dataclass(frozen=True)
class FusedLoss:
    """The cross entropy of one backend, made of its passes and of its ops on logits."""

    passes: LossPasses
    logits: Callable[[Grouped, Intake, torch.dtype], tuple[Tensor, Kept, Tensor | None]]
    logits_backward: Callable[[Grouped, Tensor, Kept, Wants], tuple[Tensor, Tensor, Tensor]]

    def way(self, p: Grouped, dtype: torch.dtype) -> str:
        """whole, rows or classes, from shapes and dtypes alone."""
        inside = self.passes.multiplied_as(dtype)
        batch, rows = p.x.shape[0], loss_by_rows.rows_at_once(self.passes, p, inside)
        if rows >= batch:
            return "whole"
        return "rows" if rows >= self.passes.fewest_rows else "classes"

    def taken_along(self, p: Grouped, wants: Wants, dtype: torch.dtype) -> Wants:
        """Those of the wanted gradients that the forward takes along: all or none."""
        # float16 could not hold them before they are scaled by what comes upstream
        return wants if dtype != torch.float16 and self.way(p, dtype) != "classes" else NOTHING

    def forward(self, p: Grouped, loss: Loss, intake: Intake, wants: Wants, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """See ``tde::cross_entropy``."""
        taken, dtype = self.taken_along(p, wants, dtype), self.passes.multiplied_as(dtype)
        along = any(taken)
        losses = _floats(p, p.x.shape[0])
        sums = _floats(p, 0 if along else p.x.shape[0], SUMS)
        gradients: Sequence[Tensor] = ()
        feature_sum: Tensor | None
        if along and self.way(p, dtype) == "rows":
            *gradients, feature_sum = loss_by_rows.run(self.passes, p, loss, intake, taken, dtype, losses)
        elif self.way(p, dtype) == "whole":
            z, saved, feature_sum = self.logits(p, intake, dtype)
            what = LossPass(sums=None if along else sums, losses=losses, gradient=along)
            self.passes.cross_entropy(z, loss, p.w.shape[0], what)
            gradients = self.logits_backward(p, z, saved, taken) if along else ()
        else:
            feature_sum = loss_by_classes.take(self.passes, p, loss, intake, dtype, losses, sums)
        if feature_sum is None:
            feature_sum = _floats(p, 0)
        return losses, *(gradients or (_floats(p, 0) for _ in Wants._fields)), sums, feature_sum

    def backward(
        self,
        p: Grouped,
        loss: Loss,
        sums: Tensor,
        wants: Wants,
        dtype: torch.dtype,
        ready: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``tde::cross_entropy_backward``; ``ready`` is called with dx, if it is wanted, before dw is complete."""
        dtype = self.passes.multiplied_as(dtype)
        if self.way(p, dtype) != "whole":
            return loss_by_classes.gradients(self.passes, p, loss, sums, wants, dtype, ready)
        z, saved, _ = self.logits(p, Intake(), dtype)
        what = LossPass(loss.first, sums=sums, take=False, gradient=True)
        self.passes.cross_entropy(z, loss, loss.of_all(p.w.shape[0]), what)
        if ready is None or not wants.x:
            return self.logits_backward(p, z, saved, wants)
        dx, dw, dscale = self.logits_backward(p, z, saved, Wants(True, False, False))
        ready(dx)
        if wants.w or wants.class_scale:
            _, dw, dscale = self.logits_backward(p, z, saved, wants._replace(x=False))
        return dx, dw, dscale

    def sums(self, p: Grouped, loss: Loss, dtype: torch.dtype) -> Tensor:
        """See ``tde::cross_entropy_sums``."""
        dtype = self.passes.multiplied_as(dtype)
        sums = p.x.new_zeros((p.x.shape[0], SUMS), dtype=torch.float32)
        sums[:, 0] = -torch.inf  # of no class: only the first of all classes begins anew
        if self.way(p, dtype) == "whole":
            z, _, _ = self.logits(p, Intake(), dtype)
            self.passes.cross_entropy(z, loss, loss.of_all(p.w.shape[0]), LossPass(loss.first, sums=sums))
        else:
            loss_by_classes.take(self.passes, p, loss, Intake(), dtype, None, sums)
        return sums

    def losses(self, sums: Tensor, *vectors: Any, **numbers: Any) -> Tensor:
        """See ``tde::cross_entropy_losses``."""
        loss = core.float_vectors(Loss(*vectors, **numbers))
        losses, nothing = sums.new_empty(len(sums)), sums.new_zeros(len(sums), 1)
        self.passes.cross_entropy(nothing, loss, loss.classes, LossPass(take=False, sums=sums, losses=losses))
        return losses
