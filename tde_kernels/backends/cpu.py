"""The CPU backend: matrix products by torch's libraries, everything around them in one pass of the compiled core.

Logits go one of three ways: ``small`` (one call of the core), ``unscaled`` (wide weights are multiplied as they are) or
``product`` (a pass over each operand before it). ``TDE_CPU_PLAN`` names one to take wherever it can serve.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor

from tde_kernels.backends import around_product, core, cpu_small, cpu_unscaled, largest, sweep
from tde_kernels.backends.core import Kept, Saved
from tde_kernels.backends.fused_loss import FusedLoss
from tde_kernels.backends.grouped import Grouped, Intake, Loss, LossPass, Rows, Wants
from tde_kernels.backends.loss_passes import ON_CPU, LossPasses
from tde_kernels.backends.product import multiplied_as, product


def refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve ``op``, or None."""
    if device.type != "cpu":
        return f"it serves tensors on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it serves float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return core.missing


def _floats(like: Tensor, *shape: int) -> Tensor:
    """A fresh float32 tensor on the device of ``like``, whatever torch's default dtype and device."""
    return like.new_empty(shape, dtype=torch.float32)


class _Passes(LossPasses, sweep.SweepPasses):
    """The passes of the compiled core."""

    workspace = ON_CPU
    fewest_rows = 1024

    def normalize(
        self,
        rows: Rows,
        dtype: torch.dtype,
        *,
        norms: Tensor | None = None,
        along: Tensor | None = None,
        mask: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor:
        """Fills ``sums [D + 1]`` as well, the feature sum of the rows that ``mask`` lets through."""
        a = core.dense_rows(rows.a)
        out = a.new_empty(a.shape, dtype=dtype)
        core.compiled().normalize_rows(
            core.matrix(a),
            core.row_transform(rows),
            core.matrix(out),
            norms=core.address(norms),
            projections=core.address(along),
            mask=core.address(mask),
            feature_sum=core.address(sums),
            threads=torch.get_num_threads(),
        )
        return out

    def backward(self, rows: Rows, v: Tensor, norms: Tensor | None, grad_divisor: Tensor | None) -> Tensor:
        a = core.dense_rows(rows.a)
        grad = v if v.dtype == a.dtype else torch.empty_like(v, dtype=a.dtype)
        core.compiled().normalize_rows_backward(
            core.matrix(v),
            core.matrix(a),
            core.address(norms),
            core.row_transform(rows),
            core.matrix(grad),
            grad_divisor=core.address(grad_divisor),
            threads=torch.get_num_threads(),
        )
        return grad

    def multiplied_as(self, dtype: torch.dtype) -> torch.dtype:
        return multiplied_as(dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return product(a, b)

    wide_product = product  # the CPU's libraries round to the operands' dtype

    def scaled_features(self, rows: Rows, dtype: torch.dtype, intake: Intake) -> tuple[Tensor, Tensor | None, Tensor]:
        """One pass over the features, whatever is asked for."""
        x_hat, norms, sums = rows.a, None, _floats(rows.a, rows.a.shape[1] + 1) if intake.asked else None
        if not rows.untouched(dtype):
            norms = _floats(rows.a, rows.a.shape[0], rows.num_heads)
            x_hat = self.normalize(rows, dtype, norms=norms, mask=intake.mask, sums=sums)
        elif sums is not None:
            _sum_rows(rows.a, intake.mask, sums)
        return x_hat, norms, _fold_intake(intake, sums, rows.a)

    def cross_entropy(self, z: Tensor, loss: Loss, classes: int, what: LossPass) -> None:
        options, todo = core.cross_entropy(loss, classes), core.loss_pass(what)
        core.compiled().cross_entropy(core.matrix(z), options, todo, torch.get_num_threads())

    def winners(self, lines: sweep.Lines, alphas: Tensor) -> Tensor:
        ascending, order = alphas.sort()
        found = alphas.new_empty((len(alphas), lines.total.shape[0]), dtype=torch.int64)
        core.compiled().alpha_sweep(
            *_polygon(lines), ascending.data_ptr(), len(alphas), found.data_ptr(), torch.get_num_threads()
        )
        return torch.empty_like(found).index_copy_(0, order, found)

    def segments(self, lines: sweep.Lines, most: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = lines.total.shape[0]
        starts = lines.total.new_empty((rows, most), dtype=torch.float64)
        classes, counts = (lines.total.new_empty(shape, dtype=torch.int64) for shape in ((rows, most), (rows,)))
        core.compiled().alpha_segments(
            *_polygon(lines), most, *(a.data_ptr() for a in (starts, classes, counts)), torch.get_num_threads()
        )
        return starts, classes, counts


PASSES = _Passes()


def _polygon(lines: sweep.Lines) -> tuple[object, int, int, int]:
    """Lines as the core takes them; the caller keeps them alive."""
    return core.matrix(lines.total), lines.along_x.data_ptr(), lines.along_w.data_ptr(), lines.along_x.shape[1]


def _fold_intake(intake: Intake, sums: Tensor | None, like: Tensor) -> Tensor:
    """Folds the sum of features into the EMA, and returns it where it is asked for."""
    if intake.ema is not None and sums is not None:
        fold_ema_(intake.ema, intake.num_updates, sums, momentum=intake.momentum)
    return sums if intake.take_sum and sums is not None else _floats(like, 0)


PLANS = ("table", "small", "unscaled", "product")
plan = os.environ.get("TDE_CPU_PLAN", "table")
if plan not in PLANS:
    raise ValueError(f"TDE_CPU_PLAN must be one of {', '.join(PLANS)}, got {plan!r}")


def _way(p: Grouped, dtype: torch.dtype) -> str:
    """small, unscaled or product, from shapes and dtypes alone."""
    if plan in ("table", "small") and cpu_small.serves(p, dtype, always=plan == "small"):
        return "small"
    if plan in ("table", "unscaled") and cpu_unscaled.serves(p, dtype, always=plan == "unscaled"):
        return "unscaled"
    return "product"


def saves(p: Grouped, dtype: torch.dtype) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`."""
    way = _way(p, dtype)
    if way == "small":
        return cpu_small.SAVES
    return cpu_unscaled.saves(PASSES, p) if way == "unscaled" else around_product.saves(PASSES, p, dtype)


def logits(p: Grouped, intake: Intake, dtype: torch.dtype) -> tuple[Tensor, Kept, Tensor | None]:
    """See ``tde::logits``."""
    way = _way(p, dtype)
    if way == "small":
        sums = _floats(p.x, p.x.shape[1] + 1) if intake.take_sum else None
        return cpu_small.logits(p, intake, sums), Kept(), sums
    sums = _floats(p.x, p.x.shape[1] + 1) if intake.asked else None
    if sums is not None and p.features.untouched(multiplied_as(dtype)):  # no pass to ride along with
        _sum_rows(p.x, intake.mask, sums)
    normalize = partial(PASSES.normalize, mask=intake.mask, sums=sums)
    if way == "unscaled":
        z, kept = cpu_unscaled.logits(p, normalize)
    else:
        z, kept = around_product.logits(PASSES, p, dtype, normalize)
    return z, kept, _fold_intake(intake, sums, p.x)


def logits_backward(p: Grouped, grad: Tensor, saved: Kept, wants: Wants) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::logits_backward``."""
    way = _way(p, grad.dtype)
    if way == "small":
        return cpu_small.logits_backward(p, grad, wants)
    if way == "unscaled":
        return cpu_unscaled.logits_backward(PASSES, p, grad, saved, wants)
    return around_product.logits_backward(PASSES, p, grad, saved, wants)


LOSS = FusedLoss(PASSES, logits, logits_backward)
taken_along = LOSS.taken_along
cross_entropy = LOSS.forward
cross_entropy_backward = LOSS.backward
cross_entropy_sums = LOSS.sums
cross_entropy_losses = LOSS.losses


def _sum_rows(x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    x = core.dense_rows(x)
    core.compiled().feature_sum(core.matrix(x), core.address(mask), out.data_ptr(), torch.get_num_threads())


def feature_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``tde::feature_sum``."""
    out = _floats(x, x.shape[1] + 1)
    _sum_rows(x, mask, out)
    return out


def update_ema_(ema: Tensor, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, *, momentum: float) -> None:
    """See ``tde::update_ema_``."""
    fold_ema_(ema, num_updates, feature_sum(x, mask), momentum=momentum)


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float) -> None:
    """See ``tde::fold_ema_``."""
    core.mark_written(ema, num_updates)
    core.compiled().fold_ema(ema.data_ptr(), core.address(num_updates), total.data_ptr(), ema.shape[0], momentum)


def background_exempt(p: Grouped, *, background: int, log: bool, dtype: torch.dtype) -> Tensor:
    """See ``tde::background_exempt``. The product is taken in float32: a difference follows it."""
    z, along_x, along_w = around_product.effects(PASSES, p)
    out = z if dtype == torch.float32 else torch.empty_like(z, dtype=dtype)
    core.compiled().background_exempt(
        core.matrix(z),
        along_x.data_ptr(),
        along_w.data_ptr(),
        p.heads,
        core.address(p.alpha),
        background,
        log,
        core.matrix(out),
        torch.get_num_threads(),
    )
    return out


def head_direction(ema: Tensor, *, num_heads: int) -> Tensor:
    """See ``tde::head_direction``. Every inference begins with it: as little as possible around the kernel."""
    ema = ema.contiguous()
    out = torch.empty_like(ema)
    core.compiled().head_direction(ema.data_ptr(), len(ema), num_heads, out.data_ptr(), torch.get_num_threads())
    return out


alpha_sweep = partial(sweep.alpha_sweep, PASSES)
alpha_segments = partial(sweep.alpha_segments, PASSES)
topk = partial(largest.topk, PASSES, logits)
