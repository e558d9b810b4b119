"""Small problems on the CPU, where a step is all overhead: one call of the core forward, one for both gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.core import Saved
from tde_kernels.backends.grouped import Grouped, Intake, Wants

SAVES = [Saved((0,))] * 5
# Beyond these the libraries' products make good for the passes around them; and the workspace, which stays, is bounded
_MOST_MULTIPLICATIONS, _MOST_WEIGHTS, _MOST_FEATURES = 1 << 25, 1 << 17, 1 << 20


def serves(p: Grouped, dtype: torch.dtype, *, always: bool = False) -> bool:
    """Whether this way is the fastest, or ``always`` whether it can serve, from shapes and dtypes alone."""
    (batch, dim), classes = p.x.shape, p.w.shape[0]
    held = classes * dim <= _MOST_WEIGHTS and batch * dim <= _MOST_FEATURES
    small = held and batch * classes * dim <= _MOST_MULTIPLICATIONS
    return (small or always) and p.x.dtype == p.w.dtype == dtype


def logits(p: Grouped, intake: Intake, sums: Tensor | None) -> Tensor:
    """The logits ``[B, C]``; the EMA takes the features in, and ``sums [D + 1]`` is filled."""
    x, w, compiled, address = core.dense_rows(p.x), core.dense_rows(p.w), core.compiled(), core.address
    z = torch.empty((x.shape[0], w.shape[0]), dtype=x.dtype, device=x.device)
    mask, ema, num_updates, momentum, _ = intake
    update = compiled.EmaUpdate(address(ema), address(num_updates), address(mask), momentum, address(sums))
    core.mark_written(ema, num_updates)
    compiled.small_logits(core.operands(p, x, w), update, z.data_ptr(), torch.get_num_threads())
    return z


def logits_backward(p: Grouped, grad: Tensor, wants: Wants) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weights and class scale, empty where they are not wanted."""
    x, w, grad = core.dense_rows(p.x), core.dense_rows(p.w), core.dense_rows(grad)
    fresh = partial(torch.empty_like, memory_format=torch.contiguous_format)
    dx = fresh(x) if wants.x else x.new_empty(0, dtype=torch.float32)
    dw = fresh(w) if wants.w or wants.class_scale else x.new_empty(0, dtype=torch.float32)
    dscale = x.new_empty(w.shape[0] if wants.class_scale else 0, dtype=torch.float32)
    core.compiled().small_logits_backward(
        core.operands(p, x, w),
        grad.data_ptr(),
        grad.stride(0),
        *(a.data_ptr() for a in (dx, dw, dscale)),  # 0 for an empty one: not wanted
        torch.get_num_threads(),
    )
    return dx, dw, dscale
