"""Cross entropy that never stores the logits: they live for a chunk of rows at a time.

The loss's gradient takes the place of a chunk's logits, and both operands' gradients are taken from it before the next
chunk. A step so costs its three products, in a workspace of :data:`WORKSPACE` bytes beside the scaled operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tde_kernels.backends.around_product import Passes
from tde_kernels.backends.grouped import Grouped, Loss, Rows, Wants

WORKSPACE = 12 << 20  # bytes of logits
_CLASSES_AT_ONCE = 1 << 13  # of a product: libraries copy their operands


class LossPasses(Passes, Protocol):
    """What a backend has to offer beside its passes around a product."""

    def cross_entropy(self, z: Tensor, loss: Loss, losses: Tensor, *, gradient: bool) -> None:
        """Fills ``losses [B]`` from logits ``z [B, C]``; the gradient of their sum replaces these if asked for."""
        ...


def cross_entropy(
    passes: LossPasses,
    p: Grouped,
    loss: Loss,
    wants: Wants,
    dtype: torch.dtype,
    normalize_features: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``tde::cross_entropy``: losses ``[B]``, and the gradients of their sum that are wanted, else empty."""
    batch, classes = p.x.shape[0], p.w.shape[0]
    x_hat, x_norms = _scaled(passes, p.features, dtype, normalize_features)
    w_hat, w_norms = _scaled(passes, p.weights, dtype)
    wants_w = wants.w or wants.class_scale
    grad_x, grad_w = (_Gradient(passes, a) for a in (p.x, p.w))
    losses = p.x.new_empty(batch, dtype=torch.float32)
    rows = max(1, WORKSPACE // (classes * dtype.itemsize))
    for begin in range(0, batch, rows):
        chunk = slice(begin, min(begin + rows, batch))
        z = _logits(passes, x_hat[chunk], w_hat)
        passes.cross_entropy(z, _of_rows(loss, chunk), losses[chunk], gradient=wants.x or wants_w)
        if wants.x:
            grad_x.put(chunk, z, w_hat)
        if wants_w:
            grad_w.add(z, x_hat[chunk])
        del z  # before the next chunk's are there
    dscale = p.w.new_empty(classes if wants.class_scale else 0, dtype=torch.float32)
    return (
        losses,
        grad_x.finish(p.features, x_norms) if wants.x else p.x.new_empty(0, dtype=torch.float32),
        grad_w.finish(p.weights, w_norms, dscale if wants.class_scale else None)
        if wants_w
        else p.w.new_empty(0, dtype=torch.float32),
        dscale,
    )


def _scaled(
    passes: Passes, rows: Rows, dtype: torch.dtype, normalize: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scaled rows and their norms, which are those of the input where nothing scales it."""
    if rows.untouched(dtype):
        return rows.a, None
    norms = rows.a.new_empty((rows.a.shape[0], rows.num_heads), dtype=torch.float32)
    return (normalize or passes.normalize)(rows, dtype, norms=norms), norms


def _of_rows(loss: Loss, rows: slice) -> Loss:
    """The loss of some of the rows."""
    return loss._replace(
        target=loss.target[rows],
        share=loss.share[rows],
        target_b=None if loss.target_b is None else loss.target_b[rows],
        share_b=None if loss.share_b is None else loss.share_b[rows],
    )


def _some_classes(number: int) -> list[slice]:
    return [slice(begin, begin + _CLASSES_AT_ONCE) for begin in range(0, number, _CLASSES_AT_ONCE)]


def _logits(passes: Passes, x_hat: Tensor, w_hat: Tensor) -> Tensor:
    parts = _some_classes(w_hat.shape[0])
    if len(parts) == 1:
        return passes.product(x_hat, w_hat)
    z = x_hat.new_empty(x_hat.shape[0], w_hat.shape[0])
    for some in parts:
        z[:, some] = passes.product(x_hat, w_hat[some])
    return z


class _Gradient:
    """The gradient ``[R, D]`` of scaled rows, put together chunk by chunk; one chunk's is taken as it is."""

    def __init__(self, passes: Passes, like: Tensor):
        self._product = passes.wide_product
        self._backward = passes.backward
        self._like = like
        self._value: Tensor | None = None

    def put(self, chunk: slice, z: Tensor, w_hat: Tensor) -> None:
        """The rows of a chunk are ``z w_hat``."""
        first, *others = _some_classes(w_hat.shape[0])
        part = self._product(z[:, first], w_hat[first].t())
        if others:
            part = part.float()
        for some in others:
            part += self._product(z[:, some], w_hat[some].t())
        if part.shape[0] == self._like.shape[0]:
            self._value = part
            return
        if self._value is None:
            self._value = self._like.new_empty(self._like.shape, dtype=part.dtype)
        self._value[chunk] = part

    def add(self, z: Tensor, x_hat: Tensor) -> None:
        """All rows gain ``z^T x_hat``, in float32 where that is not all there is."""
        parts = _some_classes(z.shape[1])
        if self._value is None and len(parts) == 1:
            self._value = self._product(z.t(), x_hat.t())
            return
        first = self._value is None
        total = self._like.new_empty(self._like.shape, dtype=torch.float32) if self._value is None else self._value
        self._value = total = total.float()
        for some in parts:
            part = self._product(z[:, some].t(), x_hat.t())
            if first:
                total[some] = part
            else:
                total[some] += part

    def finish(self, rows: Rows, norms: Tensor | None, grad_divisor: Tensor | None = None) -> Tensor:
        """The gradient of the rows themselves, in their dtype; fills that of their divisor."""
        value = self._like.new_zeros(self._like.shape) if self._value is None else self._value
        if norms is None:
            return value.to(rows.a.dtype)
        return self._backward(rows, value, norms, grad_divisor)
