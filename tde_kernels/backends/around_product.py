"""Grouped logits around another library's product: a pass over each operand before it, one over each gradient after.

The passes are a backend's own; what they compute is written down in :mod:`tde_kernels.backends.grouped`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tde_kernels.backends.grouped import Grouped, Rows


class Passes(Protocol):
    """What a backend has to offer, on ``[R, D]`` operands of ``K`` heads."""

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


def effects(passes: Passes, p: Grouped) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tde_kernels.reference.effects`: Eq. 7 ``[B, C]``, projections ``[B, K]`` and ``[C, K]``, in float32."""

    def normalized(rows: Rows) -> tuple[Tensor, Tensor]:
        along = rows.a.new_empty((rows.a.shape[0], p.heads), dtype=torch.float32)
        return passes.normalize(rows.towards(p.direction), torch.float32, along=along), along

    (x_hat, along_x), (w_hat, along_w) = normalized(p.features), normalized(p.weights)
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
