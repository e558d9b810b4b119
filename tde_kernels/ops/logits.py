"""``tde::logits``: grouped normalised logits (Eq. 7, Eq. 10), with a direction less their counterfactual (Eq. 8).

    z_bi = sum_k r(||x_b^k||) s_i(||w_i^k||) <x_b^k - alpha <x_b^k, d^k> d^k, w_i^k>

In the same pass over the features it takes their masked sum, for the EMA of the head direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.normalizers import Classifier, NormFactor
from tde_kernels.ops.library import define

_FAMILY = "int num_heads, float scale, float[] feature_factor, float[] weight_factor"


def _fake(
    x: Tensor,
    w: Tensor,
    class_scale: Tensor | None,
    direction: Tensor | None,
    alpha: Tensor | None,
    mask: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    feature_factor: list[float],
    weight_factor: list[float],
    take_sum: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    def operand(a: Tensor, untouched: bool) -> tuple[Tensor, Tensor]:
        if untouched and a.dtype == dtype:
            return a.new_empty(0, dtype=dtype), a.new_empty(0, dtype=torch.float32)
        return a.new_empty(a.shape, dtype=dtype), a.new_empty((a.shape[0], num_heads), dtype=torch.float32)

    x_hat, x_norms = operand(x, feature_factor[1] == 0 and alpha is None)
    w_hat, w_norms = operand(w, weight_factor[1] == 0 and scale == 1 and class_scale is None)
    logits = x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)
    return logits, x_hat, w_hat, x_norms, w_norms, x.new_empty(x.shape[1] + 1 if take_sum else 0, dtype=torch.float32)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    *_: Tensor | None,
    wants_x: bool,
    wants_w: bool,
    wants_class_scale: bool,
    **__: Any,
) -> tuple[Tensor, ...]:
    def like(a: Tensor, wanted: bool) -> Tensor:
        return a.new_empty(a.shape) if wanted else a.new_empty(0, dtype=torch.float32)

    dscale = x.new_empty(w.shape[0] if wants_class_scale else 0, dtype=torch.float32)
    return like(x, wants_x), like(w, wants_w or wants_class_scale), dscale


define(
    "logits(Tensor x, Tensor w, Tensor? class_scale, Tensor? direction, Tensor? alpha, Tensor? mask, *, "
    f"{_FAMILY}, bool take_sum, ScalarType dtype, str backend) "
    "-> (Tensor logits, Tensor x_hat, Tensor w_hat, Tensor x_norms, Tensor w_norms, Tensor feature_sum)",
    fake=_fake,
)
define(
    "logits_backward(Tensor grad, Tensor x, Tensor w, Tensor x_hat, Tensor w_hat, Tensor x_norms, Tensor w_norms, "
    f"Tensor? class_scale, Tensor? direction, Tensor? alpha, *, {_FAMILY}, bool wants_x, bool wants_w, "
    "bool wants_class_scale, str backend) -> (Tensor dx, Tensor dw, Tensor dclass_scale)",
    fake=_fake_backward,
)


class _Once(torch.autograd.Function):
    """A gradient as it is; its own gradient, which the kernels do not have, is an error and not a silent zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError("fused logits have no second derivative; ask for backend='reference'")


class _Logits(torch.autograd.Function):
    """Gradients for features, weights and class scale; direction and alpha are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        class_scale: Tensor | None,
        direction: Tensor | None,
        alpha: Tensor | None,
        mask: Tensor | None,
        num_heads: int,
        scale: float,
        feature_factor: NormFactor,
        weight_factor: NormFactor,
        take_sum: bool,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        logits, x_hat, w_hat, x_norms, w_norms, feature_sum = torch.ops.tde.logits(
            x,
            w,
            class_scale,
            direction,
            alpha,
            mask,
            num_heads=num_heads,
            scale=scale,
            feature_factor=feature_factor,
            weight_factor=weight_factor,
            take_sum=take_sum,
            dtype=dtype,
            backend=backend,
        )
        ctx.save_for_backward(x, w, x_hat, w_hat, x_norms, w_norms, class_scale, direction, alpha)
        ctx.family = num_heads, scale, feature_factor, weight_factor, backend
        ctx.mark_non_differentiable(feature_sum)
        return logits, feature_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, w, x_hat, w_hat, x_norms, w_norms, class_scale, direction, alpha = ctx.saved_tensors
        num_heads, scale, feature_factor, weight_factor, backend = ctx.family
        wants_x, wants_w, wants_class_scale = ctx.needs_input_grad[:3]
        dx, dw, dclass_scale = torch.ops.tde.logits_backward(
            grad,
            x,
            w,
            x_hat,
            w_hat,
            x_norms,
            w_norms,
            class_scale,
            direction,
            alpha,
            num_heads=num_heads,
            scale=scale,
            feature_factor=feature_factor,
            weight_factor=weight_factor,
            wants_x=wants_x,
            wants_w=wants_w,
            wants_class_scale=wants_class_scale,
            backend=backend,
        )
        if torch.is_grad_enabled():  # create_graph=True
            dx, dw = _Once.apply(dx, grad, x, w), _Once.apply(dw, grad, x, w)
        return (
            dx if wants_x else None,
            dw if wants_w else None,
            dclass_scale.to(class_scale.dtype) if wants_class_scale else None,
            *(None,) * 10,
        )


def logits(
    x: Tensor,
    w: Tensor,
    classifier: Classifier,
    *,
    direction: Tensor | None = None,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
    take_sum: bool = False,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Logits ``[B, C]`` in ``dtype`` of ``x [B, D]`` and, with ``take_sum``, the feature sum ``[D + 1]``."""
    logits, feature_sum = _Logits.apply(
        x,
        w,
        classifier.class_scale,
        direction,
        alpha,
        mask,
        classifier.num_heads,
        classifier.scale,
        classifier.normalizer.feature,
        classifier.normalizer.weight,
        take_sum,
        dtype,
        backend,
    )
    return logits, feature_sum
