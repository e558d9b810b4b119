"""Grouped logits and their gradients: by the kernels of small problems, or by passes around cuBLAS's product."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends import around_product
from tde_kernels.backends.core import Saved
from tde_kernels.backends.cuda import small
from tde_kernels.backends.cuda.ema import take_in
from tde_kernels.backends.cuda.rows import PASSES
from tde_kernels.backends.grouped import Grouped


def saves(p: Grouped, dtype: torch.dtype) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`: nothing where the kernels of small problems serve."""
    return small.SAVES if small.serves(p, dtype) else around_product.saves(p, dtype)


def logits(
    p: Grouped,
    mask: Tensor | None,
    ema: Tensor | None,
    num_updates: Tensor | None,
    *,
    momentum: float,
    take_sum: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """See ``tde::logits``."""
    sums = p.x.new_empty(p.x.shape[1] + 1 if take_sum else 0, dtype=torch.float32)
    taken = sums if take_sum else None
    if small.serves(p, dtype):
        z = small.logits(p, mask, ema, num_updates, taken, momentum=momentum, dtype=dtype)
        return z, *(p.x.new_empty(0, dtype=torch.float32) for _ in small.SAVES), sums
    outputs = around_product.logits(PASSES, p, dtype)
    if take_sum or ema is not None:
        take_in(ema, num_updates, p.x, mask, taken, momentum)
    return *outputs, sums


def logits_backward(
    p: Grouped,
    grad: Tensor,
    x_hat: Tensor,
    w_hat: Tensor,
    x_norms: Tensor,
    w_norms: Tensor,
    along_x: Tensor,
    **wants: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::logits_backward``."""
    if small.serves(p, grad.dtype):
        return small.logits_backward(p, grad, **wants)
    return around_product.logits_backward(PASSES, p, grad, x_hat, w_hat, x_norms, w_norms, along_x, **wants)
