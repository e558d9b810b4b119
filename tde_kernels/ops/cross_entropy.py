"""``tde::cross_entropy``: the softmax cross entropy of grouped logits, with its gradients, without the logits.

    losses[b] = sum_t share_t[b] CE(z_b, target_t[b])

The gradients are those of the losses' sum. Of a sum or a mean the forward may take them along, and the backward scales
them; else the backward computes them, for what comes upstream, from what the forward kept of each row's softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends import core, implementation
from tde_kernels.backends.grouped import NOTHING, Grouped, Intake, Loss, Wants
from tde_kernels.backends.loss_passes import SUMS
from tde_kernels.normalizers import Classifier
from tde_kernels.ops.library import batched, define, define_grouped, launch, nobody_looks

_VECTORS = Loss._fields[:7]  # of the loss; what follows are numbers


def _like(a: Tensor, wanted: bool) -> Tensor:
    return a.new_empty(a.shape) if wanted else a.new_empty(0, dtype=torch.float32)


def _fake_gradients(p: Grouped, wants: Wants) -> tuple[Tensor, Tensor, Tensor]:
    dscale = p.x.new_empty(p.w.shape[0] if wants.class_scale else 0, dtype=torch.float32)
    return _like(p.x, wants.x), _like(p.w, wants.w or wants.class_scale), dscale


def _fake(
    p: Grouped,
    *_: Tensor | None,
    take_sum: bool,
    wants_x: bool,
    wants_w: bool,
    wants_class_scale: bool,
    dtype: torch.dtype,
    backend: str,
    **__: Any,
) -> tuple[Tensor, ...]:
    batch = p.x.shape[0]
    wants = implementation(backend).taken_along(p, Wants(wants_x, wants_w, wants_class_scale), dtype)
    return (
        p.x.new_empty(batch, dtype=torch.float32),
        *_fake_gradients(p, wants),
        p.x.new_empty((0 if any(wants) else batch, SUMS), dtype=torch.float32),
        p.x.new_empty(p.x.shape[1] + 1 if take_sum else 0, dtype=torch.float32),
    )


def _fake_backward(
    p: Grouped, *_: Tensor | None, wants_x: bool, wants_w: bool, wants_class_scale: bool, **__: Any
) -> tuple[Tensor, ...]:
    return _fake_gradients(p, Wants(wants_x, wants_w, wants_class_scale))


def _values(
    *tensors: Any,
    momentum: float,
    take_sum: bool,
    wants_x: bool,
    wants_w: bool,
    wants_class_scale: bool,
    dtype: torch.dtype,
    **numbers: Any,
) -> tuple[Loss, Intake, Wants, torch.dtype]:
    mask, ema, num_updates = tensors[len(_VECTORS) :]
    return (
        core.float_vectors(Loss(*tensors[: len(_VECTORS)], **numbers)),
        Intake(mask, ema, num_updates, momentum, take_sum),
        Wants(wants_x, wants_w, wants_class_scale),
        dtype,
    )


def _backward_values(
    *tensors: Any, wants_x: bool, wants_w: bool, wants_class_scale: bool, dtype: torch.dtype, **numbers: Any
) -> tuple[Loss, Tensor, Wants, torch.dtype]:
    *vectors, sums = tensors
    return core.float_vectors(Loss(*vectors, **numbers)), sums, Wants(wants_x, wants_w, wants_class_scale), dtype


def _sums_values(*vectors: Any, dtype: torch.dtype, **numbers: Any) -> tuple[Loss, torch.dtype]:
    return core.float_vectors(Loss(*vectors, **numbers)), dtype


def _fake_sums(p: Grouped, *_: Tensor | None, **__: Any) -> Tensor:
    return p.x.new_empty((p.x.shape[0], SUMS), dtype=torch.float32)


def _fake_losses(sums: Tensor, *_: Tensor | None, **__: Any) -> Tensor:
    return sums.new_empty(sums.shape[0])


_LOSS = (
    ", Tensor target, Tensor share, Tensor? target_b, Tensor? share_b, Tensor? class_weight, Tensor? logit_bias,"
    " Tensor? margin"
)
_NUMBERS = ", float label_smoothing, int ignore_index, float focal_exponent, int first, int classes"
_WANTED = ", bool wants_x, bool wants_w, bool wants_class_scale, ScalarType dtype"
_GRADIENTS = "Tensor dx, Tensor dw, Tensor dclass_scale"

_run = define_grouped(
    "cross_entropy",
    f"{_LOSS}, Tensor? mask, Tensor(a!)? ema, Tensor(b!)? num_updates",
    f"{_NUMBERS}, float momentum, bool take_sum{_WANTED}",
    f"(Tensor losses, {_GRADIENTS}, Tensor sums, Tensor feature_sum)",
    fake=_fake,
    values=_values,
)
_run_backward = define_grouped(
    "cross_entropy_backward",
    f"{_LOSS}, Tensor sums",
    f"{_NUMBERS}{_WANTED}",
    f"({_GRADIENTS})",
    fake=_fake_backward,
    values=_backward_values,
)
_run_sums = define_grouped(
    "cross_entropy_sums",
    _LOSS,
    f"{_NUMBERS}, ScalarType dtype",
    "Tensor",
    fake=_fake_sums,
    values=_sums_values,
)
_run_losses = define(
    f"cross_entropy_losses(Tensor sums{_LOSS}, *{_NUMBERS}, str backend) -> Tensor",
    fake=_fake_losses,
)


def _numbers(loss: Loss) -> dict[str, Any]:
    return dict(zip(Loss._fields[len(_VECTORS) :], loss[len(_VECTORS) :], strict=True))


def _options(loss: Loss, wants: Wants, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """The keyword arguments of both ops."""
    return {
        **_numbers(loss),
        "wants_x": wants.x,
        "wants_w": wants.w,
        "wants_class_scale": wants.class_scale,
        "dtype": dtype,
        "backend": backend,
    }


def refuse_second_derivative() -> None:
    """Raises where a backward pass is to be differentiated."""
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
        refuse_second_derivative()
        dx, dw, dclass_scale = (
            gradient if wanted else None
            for gradient, wanted in zip(_scaled(ctx.saved_tensors, grad), ctx.needs_input_grad[:3], strict=True)
        )
        return dx, dw, None if dclass_scale is None else dclass_scale.to(ctx.scale_dtype), None, None, None, None


def _scaled(gradients: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
    """Saved ``gradients``, for what comes upstream; in their own memory where this backward is the graph's last."""
    if not nobody_looks(grad, *gradients) or batched(grad) or torch._C._autograd._get_current_graph_task_keep_graph():
        return [(gradient * grad).to(gradient.dtype) for gradient in gradients]
    if grad.is_cpu and grad.item() == 1:  # as after loss.backward(); on a GPU looking would synchronise
        return gradients
    return [gradient.mul_(grad) for gradient in gradients]


class _Losses(torch.autograd.Function):
    """The losses as they are; the gradients are computed for the upstream gradient of each."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, sums: Tensor, dtype: torch.dtype, backend: str, *operands: Any) -> Tensor:
        p, loss = Grouped(*operands[: len(Grouped._fields)]), Loss(*operands[len(Grouped._fields) :])
        ctx.save_for_backward(*p.tensors, *loss[: len(_VECTORS)], sums)
        ctx.family, ctx.numbers = p[len(p.tensors) :], loss[len(_VECTORS) :]
        ctx.dtype, ctx.backend = dtype, backend
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *tensors, sums = ctx.saved_tensors  # asked for once: checkpointing recomputes at each asking
        p, loss = Grouped(*tensors[:5], *ctx.family), Loss(*tensors[5:], *ctx.numbers)
        loss = loss._replace(share=loss.share * grad, share_b=None if loss.share_b is None else loss.share_b * grad)
        wants = Wants(*ctx.needs_input_grad[4:7])
        dx, dw, dclass_scale = _run_backward(
            p, *loss[: len(_VECTORS)], sums, **_options(loss, wants, ctx.dtype, ctx.backend)
        )
        return (
            *(None,) * 4,
            dx if wants.x else None,
            dw if wants.w else None,
            dclass_scale.to(p.class_scale.dtype) if p.class_scale is not None and wants.class_scale else None,
            *(None,) * (len(ctx.needs_input_grad) - 7),
        )


def _detached(a: Any) -> Tensor | None:
    return None if a is None else a.detach()


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
    wants = Wants(*learnt) if total else NOTHING
    vectors: tuple[Any, ...] = loss[: len(_VECTORS)]
    if nobody_looks(*p.tensors, *vectors, intake.mask, intake.ema):
        with torch.no_grad():
            found = launch("cross_entropy", backend, p, core.float_vectors(loss), intake, wants, dtype)
    else:
        found = _run(
            p.detached(),
            *map(_detached, vectors),
            intake.mask,
            intake.ema,
            intake.num_updates,
            **_options(loss, wants, dtype, backend),
            momentum=intake.momentum,
            take_sum=intake.take_sum,
        )
    losses, *gradients, sums, feature_sum = found
    if any(gradient.dim() == 2 for gradient in gradients):  # they were taken along
        return _Total.apply(*p.tensors[:3], losses, *gradients), feature_sum
    if any(learnt):
        losses = _Losses.apply(losses, sums, dtype, backend, *p, *loss)
    return losses.sum() if total else losses, feature_sum


def cross_entropy_sums(p: Grouped, loss: Loss, *, dtype: torch.dtype, backend: str) -> Tensor:
    """What the classes of ``p.w``, a shard that ``loss`` says the place of, know of each row's softmax.

    Returns:
        ``[B, SUMS]`` float32, the numbers of ``SoftmaxSums`` in ``csrc/include/tde/cross_entropy.h``.
    """
    sums: Tensor = _run_sums(p, *loss[: len(_VECTORS)], **_numbers(loss), dtype=dtype, backend=backend)
    return sums


def cross_entropy_losses(sums: Tensor, loss: Loss, *, backend: str) -> Tensor:
    """Losses ``[B]`` from the sums ``[B, SUMS]`` of all classes."""
    losses: Tensor = _run_losses(sums, *loss[: len(_VECTORS)], **_numbers(loss), backend=backend)
    return losses


def cross_entropy_gradients(
    p: Grouped,
    loss: Loss,
    sums: Tensor,
    wants: Wants,
    *,
    dtype: torch.dtype,
    backend: str,
    ready: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Gradients of the losses' sum from the sums of all classes.

    Args:
        ready: is called with the features' gradient by the classes of ``p.w`` alone, if it is wanted, in the dtype of
            ``p.x``: before the weights' is complete, so that a message may be on its way meanwhile.

    Returns:
        The gradients of weights and class scale, empty where they are not wanted.
    """
    _, dw, dclass_scale = launch(
        "cross_entropy_backward", backend, p, core.float_vectors(loss), sums, wants, dtype, ready
    )
    return dw, dclass_scale
