"""The CPU backend: matrix products by torch's libraries, everything around them in one pass of the compiled core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tde_kernels import reference
from tde_kernels.backends import core
from tde_kernels.backends.core import Saved
from tde_kernels.backends.product import product
from tde_kernels.normalizers import NormFactor


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


@dataclass(frozen=True)
class Rows:
    """One operand of a product, ``a [R, D]``, and how its rows are scaled: ``csrc/include/tde/rows.h``."""

    a: Tensor
    num_heads: int
    factor: NormFactor
    scale: float = 1.0
    divisor: Tensor | None = None
    direction: Tensor | None = None
    alpha: Tensor | None = None

    @classmethod
    def of(
        cls,
        a: Tensor,
        num_heads: int,
        factor: Sequence[float],
        *,
        scale: float = 1.0,
        divisor: Tensor | None = None,
        direction: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> Rows:
        """The operand in the forms that the core takes: dense rows, small operands as float32 vectors."""
        vectors = core.float_vector(divisor), core.float_vector(direction), alpha
        return cls(core.dense_rows(a), num_heads, NormFactor(*factor), scale, *vectors)

    def untouched(self, dtype: torch.dtype) -> bool:
        """Whether the operand is ``a`` itself, so that no pass is needed."""
        plain = self.factor.power == 0 and self.scale == 1 and self.divisor is None and self.direction is None
        return plain and self.a.dtype == dtype

    def _transform(self) -> object:
        return core.compiled().RowTransform(
            self.num_heads,
            self.factor.offset,
            self.factor.power,
            self.scale,
            core.address(self.divisor),
            core.address(self.direction),
            core.address(self.alpha),
        )

    def normalize(
        self,
        dtype: torch.dtype,
        *,
        mask: Tensor | None = None,
        sums: Tensor | None = None,
        projections: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scaled rows ``[R, D]`` in ``dtype`` and the norms ``[R, K]``; fills the others."""
        out = self.a.new_empty(self.a.shape, dtype=dtype)
        norms = _floats(self.a, self.a.shape[0], self.num_heads)
        core.compiled().normalize_rows(
            core.matrix(self.a),
            self._transform(),
            core.matrix(out),
            norms=norms.data_ptr(),
            projections=core.address(projections),
            mask=core.address(mask),
            feature_sum=core.address(sums),
            threads=torch.get_num_threads(),
        )
        return out, norms

    def backward(self, grad: Tensor, norms: Tensor, grad_divisor: Tensor | None = None) -> Tensor:
        """The gradient of ``a`` from ``grad``, that of the scaled rows, whose memory it takes over where it can."""
        grad_a = grad if grad.dtype == self.a.dtype else torch.empty_like(grad, dtype=self.a.dtype)
        core.compiled().normalize_rows_backward(
            core.matrix(grad),
            core.matrix(self.a),
            norms.data_ptr(),
            self._transform(),
            core.matrix(grad_a),
            grad_divisor=core.address(grad_divisor),
            threads=torch.get_num_threads(),
        )
        return grad_a


def saves(
    x: Tensor,
    w: Tensor,
    class_scale: Tensor | None,
    direction: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    feature_factor: Sequence[float],
    weight_factor: Sequence[float],
    dtype: torch.dtype,
) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`: scaled operands and their norms, where they are not the inputs."""
    features = Rows(x, num_heads, NormFactor(*feature_factor), direction=direction)
    weights = Rows(w, num_heads, NormFactor(*weight_factor), scale, class_scale)
    operands = [None if rows.untouched(dtype) else rows.a for rows in (features, weights)]
    hats = [Saved((0,), dtype) if a is None else Saved(a.shape, dtype) for a in operands]
    norms = [Saved((0,)) if a is None else Saved((a.shape[0], num_heads)) for a in operands]
    return [*hats, *norms, Saved((0,))]


def logits(
    x: Tensor,
    w: Tensor,
    class_scale: Tensor | None,
    direction: Tensor | None,
    alpha: Tensor | None,
    mask: Tensor | None,
    ema: Tensor | None,
    num_updates: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    feature_factor: Sequence[float],
    weight_factor: Sequence[float],
    momentum: float,
    take_sum: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """See ``tde::logits``. The counterfactual costs nothing more: it is subtracted from the features on their way."""
    sums = _floats(x, x.shape[1] + 1) if take_sum or ema is not None else None
    features = Rows.of(x, num_heads, feature_factor, direction=direction, alpha=alpha)
    weights = Rows.of(w, num_heads, weight_factor, scale=scale, divisor=class_scale)
    # outputs of an op must not be one another: an empty one each
    x_hat, w_hat = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    x_norms, w_norms = _floats(x, 0), _floats(x, 0)
    if not features.untouched(dtype):
        x_hat, x_norms = features.normalize(dtype, mask=mask, sums=sums)
    elif sums is not None:
        _sum_rows(features.a, mask, sums)
    if not weights.untouched(dtype):
        w_hat, w_norms = weights.normalize(dtype)
    if ema is not None and sums is not None:
        fold_ema_(ema, num_updates, sums, momentum=momentum)
    z = product(x_hat if x_hat.dim() == 2 else x, w_hat if w_hat.dim() == 2 else w)
    taken = sums if take_sum and sums is not None else _floats(x, 0)
    return z, x_hat, w_hat, x_norms, w_norms, _floats(x, 0), taken


def logits_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    x_hat: Tensor,
    w_hat: Tensor,
    x_norms: Tensor,
    w_norms: Tensor,
    along_x: Tensor,
    class_scale: Tensor | None,
    direction: Tensor | None,
    alpha: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    feature_factor: Sequence[float],
    weight_factor: Sequence[float],
    wants_x: bool,
    wants_w: bool,
    wants_class_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::logits_backward``: a product for each operand, then the projection in place on its result."""
    dx, dw, dscale = (_floats(x, 0) for _ in range(3))
    if wants_x:
        features = Rows.of(x, num_heads, feature_factor, direction=direction, alpha=alpha)
        dx = product(grad, (w_hat if w_hat.dim() == 2 else w).t())
        if not features.untouched(grad.dtype):
            dx = features.backward(dx, x_norms)
    if wants_w or wants_class_scale:
        weights = Rows.of(w, num_heads, weight_factor, scale=scale, divisor=class_scale)
        dw = product(grad.t(), (x_hat if x_hat.dim() == 2 else x).t())
        if not weights.untouched(grad.dtype):
            dscale = _floats(w, w.shape[0]) if wants_class_scale else dscale
            dw = weights.backward(dw, w_norms, dscale if wants_class_scale else None)
    return dx, dw, dscale


def _sum_rows(x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    core.compiled().feature_sum(core.matrix(x), core.address(mask), out.data_ptr(), torch.get_num_threads())


def feature_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``tde::feature_sum``."""
    out = _floats(x, x.shape[1] + 1)
    _sum_rows(core.dense_rows(x), mask, out)
    return out


def update_ema_(ema: Tensor, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, *, momentum: float) -> None:
    """See ``tde::update_ema_``."""
    fold_ema_(ema, num_updates, feature_sum(x, mask), momentum=momentum)


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float) -> None:
    """See ``tde::fold_ema_``."""
    core.compiled().fold_ema(ema.data_ptr(), core.address(num_updates), total.data_ptr(), ema.shape[0], momentum)
    core.mark_written(ema, num_updates)


def _effects(
    x: Tensor,
    w: Tensor,
    class_scale: Tensor | None,
    direction: Tensor,
    *,
    num_heads: int,
    scale: float,
    feature_factor: Sequence[float],
    weight_factor: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tde_kernels.reference.effects`: the projections come with the pass that normalises."""
    features = Rows.of(x, num_heads, feature_factor, direction=direction)
    weights = Rows.of(w, num_heads, weight_factor, scale=scale, divisor=class_scale, direction=direction)
    along_x, along_w = _floats(x, x.shape[0], num_heads), _floats(w, w.shape[0], num_heads)
    x_hat, _ = features.normalize(torch.float32, projections=along_x)
    w_hat, _ = weights.normalize(torch.float32, projections=along_w)
    return product(x_hat, w_hat), along_x, along_w


def background_exempt(
    x: Tensor,
    w: Tensor,
    class_scale: Tensor | None,
    direction: Tensor,
    alpha: Tensor,
    *,
    num_heads: int,
    scale: float,
    feature_factor: Sequence[float],
    weight_factor: Sequence[float],
    background: int,
    log: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See ``tde::background_exempt``. The product is taken in float32: a difference follows it."""
    z, along_x, along_w = _effects(
        x,
        w,
        class_scale,
        direction,
        num_heads=num_heads,
        scale=scale,
        feature_factor=feature_factor,
        weight_factor=weight_factor,
    )
    out = z if dtype == torch.float32 else torch.empty_like(z, dtype=dtype)
    core.compiled().background_exempt(
        core.matrix(z),
        along_x.data_ptr(),
        along_w.data_ptr(),
        num_heads,
        alpha.data_ptr(),
        background,
        log,
        core.matrix(out),
        torch.get_num_threads(),
    )
    return out


def alpha_sweep(
    x: Tensor, w: Tensor, class_scale: Tensor | None, direction: Tensor, alphas: Tensor, **family: Any
) -> Tensor:
    """See ``tde::alpha_sweep``: torch's argmax for each alpha, over a stored product."""
    return reference.winners(*_effects(x, w, class_scale, direction, **family), alphas)


def topk(
    x: Tensor,
    w: Tensor,
    class_scale: Tensor | None,
    direction: Tensor | None,
    alpha: Tensor | None,
    *,
    k: int,
    dtype: torch.dtype,
    **family: Any,
) -> tuple[Tensor, Tensor]:
    """See ``tde::topk``: torch's sort of stored logits."""
    nothing = None, None, None
    options = dict(family, momentum=0.0, take_sum=False, dtype=dtype)
    return reference.lowest_topk(logits(x, w, class_scale, direction, alpha, *nothing, **options)[0], k)
