"""Cross entropy and its gradients for some rows at a time, of operands that are scaled once: three products in all.

The gradient takes the place of a chunk's logits, and both operands' gradients are taken from it before the next chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends.around_product import Passes
from tde_kernels.backends.grouped import Grouped, Intake, Loss, LossPass, Rows, Wants
from tde_kernels.backends.loss_passes import LossPasses, scaled

_CLASSES_AT_ONCE = 1 << 13  # of a product: libraries copy their operands


def rows_at_once(passes: LossPasses, p: Grouped, dtype: torch.dtype) -> int:
    """How many rows of logits fit in the workspace."""
    return passes.workspace // (p.w.shape[0] * dtype.itemsize)


def run(
    passes: LossPasses, p: Grouped, loss: Loss, intake: Intake, wants: Wants, dtype: torch.dtype, losses: Tensor
) -> tuple[Tensor, ...]:
    """Fills ``losses [B]``; the gradients of their sum that are wanted, else empty, and the feature sum."""
    batch, classes = p.x.shape[0], p.w.shape[0]
    x_hat, x_norms, feature_sum = passes.scaled_features(p.features, dtype, intake)
    w_hat, w_norms = scaled(passes, p.weights, dtype)
    wants_w = wants.w or wants.class_scale
    grad_x, grad_w = (_Gradient(passes, a) for a in (p.x, p.w))
    rows = rows_at_once(passes, p, dtype)
    for begin in range(0, batch, rows):
        chunk = slice(begin, min(begin + rows, batch))
        z = _logits(passes, x_hat[chunk], w_hat)
        passes.cross_entropy(z, _of_rows(loss, chunk), classes, LossPass(losses=losses[chunk], gradient=True))
        if wants.x:
            grad_x.put(chunk, z, w_hat)
        if wants_w:
            grad_w.add(z, x_hat[chunk])
        del z  # before the next chunk's are there
    dscale = p.w.new_empty(classes if wants.class_scale else 0, dtype=torch.float32)
    return (
        grad_x.finish(p.features, x_norms) if wants.x else p.x.new_empty(0, dtype=torch.float32),
        grad_w.finish(p.weights, w_norms, dscale if wants.class_scale else None)
        if wants_w
        else p.w.new_empty(0, dtype=torch.float32),
        dscale,
        feature_sum,
    )


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
    """The gradient ``[R, D]`` of scaled rows, put together chunk by chunk."""

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
        if self._value is None:
            self._value = self._like.new_empty(self._like.shape, dtype=part.dtype)
        self._value[chunk] = part

    def add(self, z: Tensor, x_hat: Tensor) -> None:
        """All rows gain ``z^T x_hat``, in float32."""
        first = self._value is None
        if self._value is None:
            self._value = self._like.new_empty(self._like.shape, dtype=torch.float32)
        for some in _some_classes(z.shape[1]):
            part = self._product(z[:, some].t(), x_hat.t())
            if first:
                self._value[some] = part
            else:
                self._value[some] += part

    def finish(self, rows: Rows, norms: Tensor | None, grad_divisor: Tensor | None = None) -> Tensor:
        """The gradient of the rows themselves, in their dtype; fills that of their divisor."""
        assert self._value is not None
        if norms is None:
            return self._value.to(rows.a.dtype)
        return self._backward(rows, self._value, norms, grad_divisor)
