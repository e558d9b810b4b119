"""Grouped logits and their gradients: which of the three ways serves a problem, as the crossovers say.

The gradients of what went through tensor cores are cuBLAS's products, between passes over their operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends import around_product, crossovers
from tde_kernels.backends.core import Kept, Saved
from tde_kernels.backends.cuda import small, tiled
from tde_kernels.backends.cuda.ema import take_in
from tde_kernels.backends.cuda.rows import PASSES
from tde_kernels.backends.grouped import Grouped, Intake, Wants


def _plan(p: Grouped, dtype: torch.dtype) -> str:
    """small, tiled or product, from shapes and dtypes alone."""
    if crossovers.plan in ("table", "small") and small.can_serve(p, dtype):
        return "small"
    size = p.x.shape[0] * p.x.shape[1] * p.w.shape[0]
    wanted = crossovers.plan
    if wanted == "table":
        wanted = crossovers.choose(crossovers.LOGITS[crossovers.arithmetic(p.x.dtype)], size)
    return "tiled" if wanted in ("tiled", "hopper") and tiled.can_serve(p, dtype) else "product"


def saves(p: Grouped, dtype: torch.dtype) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`."""
    plan = _plan(p, dtype)
    if plan == "small":
        return small.SAVES
    return tiled.saves(p) if plan == "tiled" else around_product.saves(PASSES, p, dtype)


def logits(p: Grouped, intake: Intake, dtype: torch.dtype) -> tuple[Tensor, Kept, Tensor | None]:
    """See ``tde::logits``."""
    sums = p.x.new_empty(p.x.shape[1] + 1 if intake.take_sum else 0, dtype=torch.float32)
    plan = _plan(p, dtype)
    if plan != "product":
        way = small if plan == "small" else tiled
        return *way.logits(p, intake, sums, dtype), sums
    if intake.asked:
        take_in(p.x, intake, sums)
    return *around_product.logits(PASSES, p, dtype), sums


def logits_backward(p: Grouped, grad: Tensor, saved: Kept, wants: Wants) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::logits_backward``."""
    if _plan(p, grad.dtype) == "small":
        return small.logits_backward(p, grad, wants)
    return around_product.logits_backward(PASSES, p, grad, saved, wants)


def effects(p: Grouped) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tde_kernels.reference.effects`, in float32: a difference follows."""
    return tiled.effects(p) if _plan(p, torch.float32) == "tiled" else around_product.effects(PASSES, p)
