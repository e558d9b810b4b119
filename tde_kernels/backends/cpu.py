"""The CPU backend: matrix products by torch's libraries, everything around them in one pass of the compiled core."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels import reference
from tde_kernels.backends import around_product, core
from tde_kernels.backends.core import Saved
from tde_kernels.backends.grouped import Grouped, Rows
from tde_kernels.backends.product import product


def refusal(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve ``op``, or None."""
    if device_type != "cpu":
        return f"it serves tensors on the CPU, not on {device_type}"
    if dtype not in core.served_dtypes():
        return f"it serves float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return core.missing


def _floats(like: Tensor, *shape: int) -> Tensor:
    """A fresh float32 tensor on the device of ``like``, whatever torch's default dtype and device."""
    return like.new_empty(shape, dtype=torch.float32)


class _Passes(around_product.Passes):
    """The passes of the compiled core."""

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

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return product(a, b)

    wide_product = product  # the CPU's libraries round to the operands' dtype


PASSES = _Passes()


def saves(p: Grouped, dtype: torch.dtype) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`: scaled operands and their norms, where they are not the inputs."""
    operands = [None if rows.untouched(dtype) else rows for rows in (p.features, p.weights)]
    hats = [Saved((0,), dtype) if rows is None else Saved(rows.a.shape, dtype) for rows in operands]
    norms = [Saved((0,)) if rows is None else Saved((rows.a.shape[0], rows.num_heads)) for rows in operands]
    return [*hats, *norms, Saved((0,))]


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
    """See ``tde::logits``. The counterfactual costs nothing more: it is subtracted from the features on their way."""
    x, w, features, weights = p.x, p.w, p.features, p.weights
    sums = _floats(x, x.shape[1] + 1) if take_sum or ema is not None else None
    # outputs of an op must not be one another: an empty one each
    x_hat, w_hat = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    x_norms, w_norms = _floats(x, 0), _floats(x, 0)
    if not features.untouched(dtype):
        x_norms = _floats(x, x.shape[0], p.heads)
        x_hat = PASSES.normalize(features, dtype, norms=x_norms, mask=mask, sums=sums)
    elif sums is not None:
        _sum_rows(x, mask, sums)
    if not weights.untouched(dtype):
        w_norms = _floats(w, w.shape[0], p.heads)
        w_hat = PASSES.normalize(weights, dtype, norms=w_norms)
    if ema is not None and sums is not None:
        fold_ema_(ema, num_updates, sums, momentum=momentum)
    z = product(x_hat if x_hat.dim() == 2 else x, w_hat if w_hat.dim() == 2 else w)
    taken = sums if take_sum and sums is not None else _floats(x, 0)
    return z, x_hat, w_hat, x_norms, w_norms, _floats(x, 0), taken


def logits_backward(
    p: Grouped,
    grad: Tensor,
    x_hat: Tensor,
    w_hat: Tensor,
    x_norms: Tensor,
    w_norms: Tensor,
    along_x: Tensor,
    *,
    wants_x: bool,
    wants_w: bool,
    wants_class_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::logits_backward``: a product for each operand, then the projection in place on its result."""
    features, weights = p.features, p.weights
    dx, dw, dscale = (_floats(p.x, 0) for _ in range(3))
    if wants_x:
        dx = around_product.operand_gradient(PASSES, grad, features, weights, x_norms, core.kept(w_hat))
    if wants_w or wants_class_scale:
        dscale = _floats(p.w, p.w.shape[0]) if wants_class_scale else dscale
        divisor = dscale if wants_class_scale else None
        dw = around_product.operand_gradient(PASSES, grad.t(), weights, features, w_norms, core.kept(x_hat), divisor)
    return dx, dw, dscale


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
    core.compiled().fold_ema(ema.data_ptr(), core.address(num_updates), total.data_ptr(), ema.shape[0], momentum)
    core.mark_written(ema, num_updates)


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


def alpha_sweep(p: Grouped, alphas: Tensor) -> Tensor:
    """See ``tde::alpha_sweep``: torch's argmax for each alpha, over a stored product."""
    return reference.winners(*around_product.effects(PASSES, p), alphas)


def topk(p: Grouped, *, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See ``tde::topk``: torch's sort of stored logits."""
    stored, *_ = logits(p, None, None, None, momentum=0.0, take_sum=False, dtype=dtype)
    return reference.lowest_topk(stored, k)
