"""``tde::logits``: grouped normalised logits (Eq. 7, Eq. 10), with a direction less their counterfactual (Eq. 8).

    z_bi = sum_k r(||x_b^k||) s_i(||w_i^k||) <x_b^k - alpha <x_b^k, d^k> d^k, w_i^k>

In the same pass over the features it takes their masked sum, and folds it into the EMA of the head direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends import implementation
from tde_kernels.backends.core import Kept
from tde_kernels.backends.grouped import Grouped, Intake, Wants
from tde_kernels.normalizers import Classifier, NormFactor
from tde_kernels.ops.library import define_grouped


def _fake(
    p: Grouped, *_: Tensor | None, take_sum: bool, dtype: torch.dtype, backend: str, **__: Any
) -> tuple[Any, ...]:
    return (
        p.x.new_empty((p.x.shape[0], p.w.shape[0]), dtype=dtype),
        *(p.x.new_empty(shape, dtype=kind) for shape, kind in implementation(backend).saves(p, dtype)),
        p.x.new_empty(p.x.shape[1] + 1 if take_sum else 0, dtype=torch.float32),
    )


def _fake_backward(
    p: Grouped, *_: Tensor, wants_x: bool, wants_w: bool, wants_class_scale: bool, **__: Any
) -> tuple[Tensor, ...]:
    def like(a: Tensor, wanted: bool) -> Tensor:
        return a.new_empty(a.shape) if wanted else a.new_empty(0, dtype=torch.float32)

    dscale = p.x.new_empty(p.w.shape[0] if wants_class_scale else 0, dtype=torch.float32)
    return like(p.x, wants_x), like(p.w, wants_w or wants_class_scale), dscale


def _forward_values(
    mask: Tensor | None,
    ema: Tensor | None,
    num_updates: Tensor | None,
    *,
    momentum: float,
    take_sum: bool,
    dtype: torch.dtype,
) -> tuple[Intake, torch.dtype]:
    return Intake(mask, ema, num_updates, momentum, take_sum), dtype


def _backward_values(
    grad: Tensor, *saved: Tensor, wants_x: bool, wants_w: bool, wants_class_scale: bool
) -> tuple[Tensor, Kept, Wants]:
    return grad, Kept(*saved), Wants(wants_x, wants_w, wants_class_scale)


define_grouped(
    "logits",
    ", Tensor? mask, Tensor(a!)? ema, Tensor(b!)? num_updates",
    ", float momentum, bool take_sum, ScalarType dtype",
    "(Tensor logits, Tensor x_hat, Tensor w_hat, Tensor x_norms, Tensor w_norms, Tensor along_x, Tensor feature_sum)",
    fake=_fake,
    values=_forward_values,
)
define_grouped(
    "logits_backward",
    ", Tensor grad, Tensor x_hat, Tensor w_hat, Tensor x_norms, Tensor w_norms, Tensor along_x",
    ", bool wants_x, bool wants_w, bool wants_class_scale",
    "(Tensor dx, Tensor dw, Tensor dclass_scale)",
    fake=_fake_backward,
    values=_backward_values,
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
        direction: Tensor | None,
        alpha: Tensor | None,
        num_heads: int,
        scale: float,
        feature_factor: NormFactor,
        weight_factor: NormFactor,
        logits: Tensor,
        backend: str,
        *saved: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, w, class_scale, direction, alpha, *saved)
        ctx.family = num_heads, scale, feature_factor, weight_factor
        ctx.backend = backend
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # asked for once: checkpointing recomputes at each asking
        p = Grouped(*tensors[:5], *ctx.family)
        wants_x, wants_w, wants_class_scale = ctx.needs_input_grad[:3]
        dx, dw, dclass_scale = torch.ops.tde.logits_backward(
            *p.tensors,
            grad,
            *tensors[5:],
            **p.family,
            wants_x=wants_x,
            wants_w=wants_w,
            wants_class_scale=wants_class_scale,
            backend=ctx.backend,
        )
        if torch.is_grad_enabled():  # create_graph=True
            dx, dw = _Once.apply(dx, grad, p.x, p.w), _Once.apply(dw, grad, p.x, p.w)
        return (
            dx if wants_x else None,
            dw if wants_w else None,
            dclass_scale.to(p.class_scale.dtype) if p.class_scale is not None and wants_class_scale else None,
            *(None,) * (len(ctx.needs_input_grad) - 3),
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
    p = Grouped.of(x, w, classifier, direction, alpha)
    z, *saved, feature_sum = torch.ops.tde.logits(
        *map(_detached, p.tensors),
        mask,
        ema,
        num_updates,
        **p.family,
        momentum=momentum,
        take_sum=take_sum,
        dtype=dtype,
        backend=backend,
    )
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in p.tensors[:3]):
        z = _Differentiable.apply(*p, z, backend, *saved)
    return z, feature_sum
