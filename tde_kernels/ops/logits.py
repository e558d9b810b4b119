"""``tde::logits``: grouped normalised logits (Eq. 7, Eq. 10), with a direction less their counterfactual (Eq. 8).

    z_bi = sum_k r(||x_b^k||) s_i(||w_i^k||) <x_b^k - alpha <x_b^k, d^k> d^k, w_i^k>

In the same pass over the features it takes their masked sum, and folds it into the EMA of the head direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends import implementation
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
    ema: Tensor | None,
    num_updates: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    feature_factor: list[float],
    weight_factor: list[float],
    momentum: float,
    take_sum: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    saved = implementation(backend).saves(
        x,
        w,
        class_scale,
        direction,
        num_heads=num_heads,
        scale=scale,
        feature_factor=feature_factor,
        weight_factor=weight_factor,
        dtype=dtype,
    )
    return (
        x.new_empty((x.shape[0], w.shape[0]), dtype=dtype),
        *(x.new_empty(shape, dtype=kind) for shape, kind in saved),
        x.new_empty(x.shape[1] + 1 if take_sum else 0, dtype=torch.float32),
    )


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
    "logits(Tensor x, Tensor w, Tensor? class_scale, Tensor? direction, Tensor? alpha, Tensor? mask, "
    f"Tensor(a!)? ema, Tensor(b!)? num_updates, *, {_FAMILY}, float momentum, bool take_sum, ScalarType dtype, "
    "str backend) -> (Tensor logits, Tensor x_hat, Tensor w_hat, Tensor x_norms, Tensor w_norms, Tensor along_x, "
    "Tensor feature_sum)",
    fake=_fake,
)
define(
    "logits_backward(Tensor grad, Tensor x, Tensor w, Tensor x_hat, Tensor w_hat, Tensor x_norms, Tensor w_norms, "
    "Tensor along_x, Tensor? class_scale, Tensor? direction, Tensor? alpha, *, "
    f"{_FAMILY}, bool wants_x, bool wants_w, bool wants_class_scale, str backend) "
    "-> (Tensor dx, Tensor dw, Tensor dclass_scale)",
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


class _Differentiable(torch.autograd.Function):
    """The logits as they are, with gradients for features, weights and class scale; the rest is constant.

    They are computed before, outside of autograd: compiled graphs admit no Function whose forward writes to the EMA.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        class_scale: Tensor | None,
        logits: Tensor,
        direction: Tensor | None,
        alpha: Tensor | None,
        x_hat: Tensor,
        w_hat: Tensor,
        x_norms: Tensor,
        w_norms: Tensor,
        along_x: Tensor,
        num_heads: int,
        scale: float,
        feature_factor: NormFactor,
        weight_factor: NormFactor,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, w, x_hat, w_hat, x_norms, w_norms, along_x, class_scale, direction, alpha)
        ctx.family = num_heads, scale, feature_factor, weight_factor, backend
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: checkpointing recomputes at each asking
        x, w, class_scale = saved[0], saved[1], saved[-3]
        num_heads, scale, feature_factor, weight_factor, backend = ctx.family
        wants_x, wants_w, wants_class_scale = ctx.needs_input_grad[:3]
        dx, dw, dclass_scale = torch.ops.tde.logits_backward(
            grad,
            *saved,
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
            *(None,) * 13,
        )


def _detached(a: Tensor | None) -> Tensor | None:
    return None if a is None else a.detach()


def logits(
    x: Tensor,
    w: Tensor,
    classifier: Classifier,
    *,
    direction: Tensor | None = None,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
    ema: Tensor | None = None,
    num_updates: Tensor | None = None,
    momentum: float = 0.0,
    take_sum: bool = False,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Logits ``[B, C]`` in ``dtype`` of ``x [B, D]`` and, with ``take_sum``, the feature sum ``[D + 1]``.

    With ``ema [D]``, the batch is folded into it in the same pass.
    """
    family = {
        "num_heads": classifier.num_heads,
        "scale": classifier.scale,
        "feature_factor": classifier.normalizer.feature,
        "weight_factor": classifier.normalizer.weight,
        "backend": backend,
    }
    operands = x, w, classifier.class_scale
    z, *saved, feature_sum = torch.ops.tde.logits(
        *map(_detached, operands),
        direction,
        alpha,
        mask,
        ema,
        num_updates,
        momentum=momentum,
        take_sum=take_sum,
        dtype=dtype,
        **family,
    )
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in operands):
        z = _Differentiable.apply(*operands, z, direction, alpha, *saved, *family.values())
    return z, feature_sum
