"""Small problems, where a step is all launches: forward in one, the EMA included, and a gradient in one each."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.core import Kept, Saved
from tde_kernels.backends.cuda.device import scratch, stream_of
from tde_kernels.backends.cuda.ema import ema_update
from tde_kernels.backends.grouped import Grouped, Intake, Rows, Wants

SAVES = [Saved((0,))] * 5
# As the core's small_logits_fit, which would turn symbolic sizes into numbers
_MOST_COLUMNS, _MOST_CLASSES = 256, 1024


def can_serve(p: Grouped, dtype: torch.dtype) -> bool:
    """Whether these kernels can serve the problem, from shapes and dtypes alone."""
    (batch, dim), classes = p.x.shape, p.w.shape[0]
    columns = p.heads * ((dim // p.heads + 3) // 4 * 4)  # a head starts on 16 bytes
    fit = 0 < columns <= _MOST_COLUMNS and 0 < classes <= _MOST_CLASSES and batch > 0
    return fit and p.x.dtype == p.w.dtype == dtype


def _operand(rows: Rows, a: Tensor) -> object:
    return core.compiled().Operand(core.matrix(a), core.row_transform(rows))


def logits(p: Grouped, intake: Intake, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Kept]:
    """The logits ``[B, C]``; nothing is kept; ``sums [D + 1]`` is filled if it is asked for."""
    x, w = core.dense_rows(p.x), core.dense_rows(p.w)
    z = x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)
    floats, counters = scratch(x, core.compiled().cuda_small_logits_scratch(*x.shape))
    core.mark_written(intake.ema, intake.num_updates)
    with stream_of(x) as stream:
        core.compiled().cuda_small_logits(
            _operand(p.features, x),
            _operand(p.weights, w),
            ema_update(intake, sums),
            core.matrix(z),
            floats.data_ptr(),
            counters.data_ptr(),
            stream,
        )
    return z, Kept()


def _gradient(own: Rows, other: Rows, grad: Tensor, grad_divisor: Tensor | None) -> Tensor:
    a, b = core.dense_rows(own.a), core.dense_rows(other.a)
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    wanted = core.compiled().cuda_small_logits_backward_scratch(a.shape[0], b.shape[0], a.shape[1], own.num_heads)
    floats, counters = scratch(a, wanted)
    with stream_of(a) as stream:
        core.compiled().cuda_small_logits_backward(
            _operand(own, a),
            _operand(other, b),
            core.matrix(grad),
            grad.stride(1),
            core.matrix(out),
            core.address(grad_divisor),
            floats.data_ptr(),
            counters.data_ptr(),
            stream,
        )
    return out


def logits_backward(p: Grouped, grad: Tensor, wants: Wants) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weights and class scale, empty where they are not wanted: at most two launches."""
    dx, dw = (p.x.new_empty(0, dtype=torch.float32) for _ in range(2))
    dscale = p.x.new_empty(p.w.shape[0] if wants.class_scale else 0, dtype=torch.float32)
    if wants.x:
        dx = _gradient(p.features, p.weights, grad, None)
    if wants.w or wants.class_scale:
        dw = _gradient(p.weights, p.features, grad.t(), dscale if wants.class_scale else None)
    return dx, dw, dscale
