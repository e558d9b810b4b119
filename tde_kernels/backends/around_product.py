"""Grouped logits around another library's product: a pass over each operand before it, one over each gradient after.

The passes are a backend's own; what they compute is written down in :mod:`tde_kernels.backends.grouped`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tde_kernels.backends.core import Kept, Saved
from tde_kernels.backends.grouped import Grouped, Rows, Wants
from tde_kernels.normalizers import NormFactor


class Passes(Protocol):
    """What a backend has to offer, on ``[R, D]`` operands of ``K`` heads."""

    def multiplied_as(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that operands of a product in ``dtype`` are scaled into."""
        return dtype

    def normalize(
        self, rows: Rows, dtype: torch.dtype, *, norms: Tensor | None = None, along: Tensor | None = None
    ) -> Tensor:
        """The scaled rows ``[R, D]`` in ``dtype``; fills ``norms [R, K]`` and ``along [R, K] = <a_hat^k, d^k>``."""
        ...

    def backward(self, rows: Rows, v: Tensor, norms: Tensor | None, grad_divisor: Tensor | None) -> Tensor:
        """The gradient of ``a`` from ``v [R, D]``, that of the scaled rows, whose memory it may take over.

        Fills ``grad_divisor [R]``.
        """
        ...

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b^T`` of ``a [M, N]`` and ``b [P, N]``, in their dtype."""
        ...

    def wide_product(self, a: Tensor, b: Tensor) -> Tensor:
        """The same, in float32 where the library can: a difference follows it."""
        ...


class DeviceProducts(Passes, Protocol):
    """The products of a GPU's own library."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b.t())

    def wide_product(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype == torch.float32:
            return torch.mm(a, b.t())
        if a.is_cuda:
            return torch.mm(a, b.t(), out_dtype=torch.float32)
        return torch.mm(a.float(), b.t().float())  # kernels run on the CPU: its product has no such option


def saves(passes: Passes, p: Grouped, dtype: torch.dtype) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`: scaled operands and their norms, where they are not the inputs."""
    dtype = passes.multiplied_as(dtype)
    operands = [None if rows.untouched(dtype) else rows for rows in (p.features, p.weights)]
    hats = [Saved((0,), dtype) if rows is None else Saved(rows.a.shape, dtype) for rows in operands]
    norms = [Saved((0,)) if rows is None else Saved((rows.a.shape[0], rows.num_heads)) for rows in operands]
    return [*hats, *norms, Saved((0,))]


def logits(
    passes: Passes,
    p: Grouped,
    dtype: torch.dtype,
    normalize_features: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Kept]:
    """The logits and what :func:`saves` lists. The counterfactual is subtracted from the features on their way.

    Args:
        normalize_features: does more in its pass over the features than ``passes.normalize``, whose arguments it takes.
    """
    inside = passes.multiplied_as(dtype)
    hats: list[Tensor | None] = []
    norms: list[Tensor | None] = []
    for rows, normalize in ((p.features, normalize_features or passes.normalize), (p.weights, passes.normalize)):
        untouched = rows.untouched(inside)
        norm = None if untouched else rows.a.new_empty((rows.a.shape[0], p.heads), dtype=torch.float32)
        hats.append(None if untouched else normalize(rows, inside, norms=norm))
        norms.append(norm)
    x_hat, w_hat = (a if hat is None else hat for hat, a in zip(hats, (p.x, p.w), strict=True))
    return passes.product(x_hat, w_hat).to(dtype), Kept(*hats, *norms)


def logits_backward(
    passes: Passes,
    p: Grouped,
    grad: Tensor,
    saved: Kept,
    wants: Wants,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::logits_backward``: a product for each operand, then the projection in place on its result."""
    features, weights = p.features, p.weights
    grad = grad.to(passes.multiplied_as(grad.dtype))
    dx, dw, dscale = (p.x.new_empty(0, dtype=torch.float32) for _ in range(3))
    if wants.x:
        dx = operand_gradient(passes, grad, features, weights, saved.x_norms, saved.w_hat)
    if wants.w or wants.class_scale:
        dscale = p.w.new_empty(p.w.shape[0], dtype=torch.float32) if wants.class_scale else dscale
        divisor = dscale if wants.class_scale else None
        dw = operand_gradient(passes, grad.t(), weights, features, saved.w_norms, saved.x_hat, divisor)
    return dx, dw, dscale


def normalized(passes: Passes, rows: Rows, p: Grouped) -> tuple[Tensor, Tensor]:
    """One operand of ``p`` scaled, in float32, and its projections ``[R, K]`` on the direction, which stays in it."""
    along = rows.a.new_empty((rows.a.shape[0], p.heads), dtype=torch.float32)
    return passes.normalize(rows.towards(p.direction), torch.float32, along=along), along


def head_direction(passes: Passes, ema: Tensor, *, num_heads: int) -> Tensor:
    """See ``tde::head_direction``."""
    return passes.normalize(Rows(ema[None], num_heads, NormFactor(power=1.0)), torch.float32)[0]


def effects(passes: Passes, p: Grouped) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tde_kernels.reference.effects`: Eq. 7 ``[B, C]``, projections ``[B, K]`` and ``[C, K]``, in float32."""
    (x_hat, along_x), (w_hat, along_w) = (normalized(passes, rows, p) for rows in (p.features, p.weights))
    return passes.product(x_hat, w_hat), along_x, along_w


def operand_gradient(
    passes: Passes,
    grad: Tensor,
    own: Rows,
    other: Rows,
    own_norms: Tensor | None,
    other_hat: Tensor | None,
    grad_divisor: Tensor | None = None,
) -> Tensor:
    """The gradient of ``own.a [R, D]`` from ``grad [R, N]``; into ``grad_divisor [R]`` that of its divisor.

    Args:
        other_hat: the other operand, scaled, if the forward kept it.
    """
    if other_hat is None:
        other_hat = other.a if other.untouched(grad.dtype) else passes.normalize(other, grad.dtype)
    if own.untouched(grad.dtype):
        return passes.product(grad, other_hat.t())
    return passes.backward(own, passes.wide_product(grad, other_hat.t()), own_norms, grad_divisor)
