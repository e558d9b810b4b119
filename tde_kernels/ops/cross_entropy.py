"""``tde::cross_entropy``: the softmax cross entropy of grouped logits, with its gradients, without the logits.

    losses[b] = sum_t share_t[b] CE(z_b, target_t[b])

The gradients are those of the losses' sum. Of a sum or a mean the forward takes them along where autograd will want
them, and the backward scales them; where every sample's loss is returned, the backward computes them for what comes
upstream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.grouped import Grouped, Intake, Loss, Wants
from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import define_grouped

_VECTORS = Loss._fields[:7]  # of the loss; what follows are numbers


def _fake(
    p: Grouped,
    *_: Tensor | None,
    take_sum: bool,
    wants_x: bool,
    wants_w: bool,
    wants_class_scale: bool,
    **__: Any,
) -> tuple[Tensor, ...]:
    def like(a: Tensor, wanted: bool) -> Tensor:
        return a.new_empty(a.shape) if wanted else a.new_empty(0, dtype=torch.float32)

    return (
        p.x.new_empty(p.x.shape[0], dtype=torch.float32),
        like(p.x, wants_x),
        like(p.w, wants_w or wants_class_scale),
        p.x.new_empty(p.w.shape[0] if wants_class_scale else 0, dtype=torch.float32),
        p.x.new_empty(p.x.shape[1] + 1 if take_sum else 0, dtype=torch.float32),
    )


def _values(
    *tensors: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    focal_exponent: float,
    momentum: float,
    take_sum: bool,
    wants_x: bool,
    wants_w: bool,
    wants_class_scale: bool,
    dtype: torch.dtype,
) -> tuple[Loss, Intake, Wants, torch.dtype]:
    target, share, target_b, share_b, class_weight, logit_bias, margin = tensors[: len(_VECTORS)]
    assert target is not None and share is not None
    loss = Loss(
        target,
        share,
        target_b,
        share_b,
        core.float_vector(class_weight),
        core.float_vector(logit_bias),
        core.float_vector(margin),
        label_smoothing,
        ignore_index,
        focal_exponent,
    )
    mask, ema, num_updates = tensors[len(_VECTORS) :]
    return (
        loss,
        Intake(mask, ema, num_updates, momentum, take_sum),
        Wants(wants_x, wants_w, wants_class_scale),
        dtype,
    )


define_grouped(
    "cross_entropy",
    ", Tensor target, Tensor share, Tensor? target_b, Tensor? share_b, Tensor? class_weight, Tensor? logit_bias,"
    " Tensor? margin, Tensor? mask, Tensor(a!)? ema, Tensor(b!)? num_updates",
    ", float label_smoothing, int ignore_index, float focal_exponent, float momentum, bool take_sum, bool wants_x,"
    " bool wants_w, bool wants_class_scale, ScalarType dtype",
    "(Tensor losses, Tensor dx, Tensor dw, Tensor dclass_scale, Tensor feature_sum)",
    fake=_fake,
    values=_values,
)


def _run(p: Grouped, loss: Loss, intake: Intake, wants: Wants, dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = torch.ops.tde.cross_entropy(
        *(a.detach() if isinstance(a, Tensor) else None for a in (*p.tensors, *loss[: len(_VECTORS)])),
        intake.mask,
        intake.ema,
        intake.num_updates,
        **p.family,
        label_smoothing=loss.label_smoothing,
        ignore_index=loss.ignore_index,
        focal_exponent=loss.focal_exponent,
        momentum=intake.momentum,
        take_sum=intake.take_sum,
        wants_x=wants.x,
        wants_w=wants.w,
        wants_class_scale=wants.class_scale,
        dtype=dtype,
        backend=backend,
    )
    return results


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("the fused loss has no second derivative; ask for backend='reference'")


class _Total(torch.autograd.Function):
    """The sum of the losses as it is, with gradients that are there already."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        class_scale: Tensor | None,
        losses: Tensor,
        dx: Tensor,
        dw: Tensor,
        dclass_scale: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(dx, dw, dclass_scale)
        ctx.scale_dtype = None if class_scale is None else class_scale.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        dx, dw, dclass_scale = (
            (gradient * grad).to(gradient.dtype) if wanted else None
            for gradient, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        )
        return dx, dw, None if dclass_scale is None else dclass_scale.to(ctx.scale_dtype), None, None, None, None


class _EachLoss(torch.autograd.Function):
    """The losses as they are; the gradients are computed for the upstream gradient of each."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, dtype: torch.dtype, backend: str, *operands: Any) -> Tensor:
        p, loss = Grouped(*operands[: len(Grouped._fields)]), Loss(*operands[len(Grouped._fields) :])
        ctx.save_for_backward(*p.tensors, *loss[: len(_VECTORS)])
        ctx.family, ctx.numbers = p[len(p.tensors) :], loss[len(_VECTORS) :]
        ctx.dtype, ctx.backend = dtype, backend
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        tensors = ctx.saved_tensors  # asked for once: checkpointing recomputes at each asking
        p, loss = Grouped(*tensors[:5], *ctx.family), Loss(*tensors[5:], *ctx.numbers)
        loss = loss._replace(share=loss.share * grad, share_b=None if loss.share_b is None else loss.share_b * grad)
        wants = Wants(*ctx.needs_input_grad[3:6])
        _, dx, dw, dclass_scale, _ = _run(p, loss, Intake(), wants, ctx.dtype, ctx.backend)
        return (
            *(None,) * 3,
            dx if wants.x else None,
            dw if wants.w else None,
            dclass_scale.to(p.class_scale.dtype) if p.class_scale is not None and wants.class_scale else None,
            *(None,) * (len(ctx.needs_input_grad) - 6),
        )


def cross_entropy(
    x: Tensor,
    w: Tensor,
    classifier: Classifier,
    loss: Loss,
    *,
    total: bool,
    intake: Intake,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Losses ``[B]`` of ``x [B, D]``, or their ``total``, and the feature sum ``[D + 1]`` if it is asked for.

    Args:
        dtype: of the product.
    """
    p = Grouped.of(x, w, classifier)
    learnt = [torch.is_grad_enabled() and a is not None and a.requires_grad for a in p.tensors[:3]]
    wants = Wants(*learnt) if total else Wants(False, False, False)
    losses, *gradients, feature_sum = _run(p, loss, intake, wants, dtype, backend)
    if not any(learnt):
        return losses.sum() if total else losses, feature_sum
    if total:
        return _Total.apply(*p.tensors[:3], losses, *gradients), feature_sum
    return _EachLoss.apply(losses, dtype, backend, *p, *loss), feature_sum
