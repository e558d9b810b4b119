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
from tde_kernels.backends.grouped import NO_INTAKE, Grouped, Intake, Wants, plain
from tde_kernels.normalizers import Classifier, NormFactor
from tde_kernels.ops.library import batched, define_grouped, launch, nobody_looks


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
    return grad, Kept.unless_empty(*saved), Wants(wants_x, wants_w, wants_class_scale)


def _flat(
    p: Grouped, found: tuple[Tensor, Kept, Tensor | None], *, dtype: torch.dtype, backend: str, **_: Any
) -> tuple[Tensor, ...]:
    z, kept, feature_sum = found
    specs = zip(kept, implementation(backend).saves(p, dtype), strict=True)
    filled = [p.x.new_empty(spec.shape, dtype=spec.dtype) if a is None else a for a, spec in specs]
    return z, *filled, p.x.new_empty(0, dtype=torch.float32) if feature_sum is None else feature_sum


def _nested(z: Tensor, *others: Tensor) -> tuple[Tensor, Kept, Tensor]:
    *saved, feature_sum = others
    return z, Kept.unless_empty(*saved), feature_sum


_run = define_grouped(
    "logits",
    ", Tensor? mask, Tensor(a!)? ema, Tensor(b!)? num_updates",
    ", float momentum, bool take_sum, ScalarType dtype",
    "(Tensor logits, Tensor x_hat, Tensor w_hat, Tensor x_norms, Tensor w_norms, Tensor along_x, Tensor feature_sum)",
    fake=_fake,
    values=_forward_values,
    flat=_flat,
    nested=_nested,
)
_run_backward = define_grouped(
    "logits_backward",
    ", Tensor grad, Tensor? x_hat, Tensor? w_hat, Tensor? x_norms, Tensor? w_norms, Tensor? along_x",
    ", bool wants_x, bool wants_w, bool wants_class_scale",
    "(Tensor dx, Tensor dw, Tensor dclass_scale)",
    fake=_fake_backward,
    values=_backward_values,
)


class _Once(torch.autograd.Function):
    """A gradient as it is; its own gradient, which the kernels do not have, is an error and not a silent zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> Tensor:
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
        *saved: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, w, class_scale, direction, alpha, *saved)
        ctx.family = num_heads, scale, feature_factor, weight_factor
        ctx.backend = backend
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # asked for once: checkpointing recomputes at each asking
        p = Grouped(*tensors[:5], *ctx.family)
        wants_x, wants_w, wants_class_scale = wants = Wants(*ctx.needs_input_grad[:3])
        grad = plain(grad)
        if nobody_looks(grad, p.x, p.w) and not batched(grad):
            with torch.no_grad():  # grad mode is on under create_graph=True
                dx, dw, dclass_scale = launch("logits_backward", ctx.backend, p, grad, Kept(*tensors[5:]), wants)
        else:
            wanted = {"wants_x": wants_x, "wants_w": wants_w, "wants_class_scale": wants_class_scale}
            dx, dw, dclass_scale = _run_backward(p, grad, *tensors[5:], **wanted, backend=ctx.backend)
        if torch.is_grad_enabled():  # create_graph=True
            dx, dw, dclass_scale = (_Once.apply(a, grad, p.x, p.w, p.class_scale) for a in (dx, dw, dclass_scale))
        return (
            dx if wants_x else None,
            dw if wants_w else None,
            dclass_scale.to(p.class_scale.dtype) if p.class_scale is not None and wants_class_scale else None,
            *(None,) * (len(ctx.needs_input_grad) - 3),
        )


class _Launched(_Differentiable):
    """The same where nobody looks: the kernels run inside, which saves the detours."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _, _, _, p, intake, dtype, backend, feature_sum = arguments  # the first three for their gradients
        z, kept, total = launch("logits", backend, p, intake, dtype)
        feature_sum.append(total)
        ctx.save_for_backward(*p.tensors, *kept)
        ctx.family, ctx.backend = p[5:], backend
        result: Tensor = z
        return result


def logits(
    x: Tensor,
    w: Tensor,
    classifier: Classifier,
    *,
    direction: Tensor | None = None,
    alpha: Tensor | None = None,
    intake: Intake = NO_INTAKE,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Logits ``[B, C]`` in ``dtype`` of ``x [B, D]`` and the feature sum ``[D + 1]``, if ``intake`` asks for it."""
    p = Grouped.of(x, w, classifier, direction, alpha)
    learns = torch.is_grad_enabled() and (
        x.requires_grad or w.requires_grad or (p.class_scale is not None and p.class_scale.requires_grad)
    )
    if nobody_looks(x, w, p.class_scale, intake.ema, intake.mask):
        if not learns:
            z, _, feature_sum = launch("logits", backend, p, intake, dtype)
            return z, feature_sum
        sums: list[Tensor | None] = []
        return _Launched.apply(p.x, p.w, p.class_scale, p, intake, dtype, backend, sums), sums[0]
    mask, ema, num_updates, momentum, take_sum = intake
    options = {"momentum": momentum, "take_sum": take_sum, "dtype": dtype, "backend": backend}
    z, kept, feature_sum = _run(p.detached(), mask, ema, num_updates, **options)
    return _Differentiable.apply(*p, z, backend, *kept) if learns else z, feature_sum
