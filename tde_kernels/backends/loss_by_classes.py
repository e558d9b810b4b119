"""Cross entropy for some classes at a time, in a workspace that knows no number of classes.

What is known of each row's softmax is carried from one chunk of classes to the next, and kept for the gradients, which
multiply once more. The weights' gradient is complete with each chunk: nothing of the size of the weights is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tde_kernels.backends.by_classes import class_chunks, some_classes
from tde_kernels.backends.grouped import Grouped, Intake, Loss, LossPass, Wants
from tde_kernels.backends.loss_passes import LossPasses, scaled


def _chunks(passes: LossPasses, p: Grouped, dtype: torch.dtype) -> Iterator[slice]:
    return class_chunks(p, dtype, passes.workspace // 2)  # the products' results take the rest


def take(
    passes: LossPasses, p: Grouped, loss: Loss, intake: Intake, dtype: torch.dtype, losses: Tensor | None, sums: Tensor
) -> Tensor:
    """Fills ``losses [B]``, if there are any, and ``sums [B, SUMS]``; returns the feature sum."""
    held = p.w.shape[0]
    x_hat, _, feature_sum = passes.scaled_features(p.features, dtype, intake)
    for chunk in _chunks(passes, p, dtype):
        w_hat, _ = scaled(passes, some_classes(p.weights, chunk), dtype)
        z = passes.product(x_hat, w_hat)
        complete = chunk.stop == held
        what = LossPass(loss.first + chunk.start, sums=sums, losses=losses if complete else None)
        passes.cross_entropy(z, loss, loss.of_all(held), what)
    return feature_sum


def gradients(
    passes: LossPasses,
    p: Grouped,
    loss: Loss,
    sums: Tensor,
    wants: Wants,
    dtype: torch.dtype,
    ready: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the losses' sum that are wanted, else empty; ``ready`` is called with that of the features."""
    held = p.w.shape[0]
    wants_w = wants.w or wants.class_scale
    x_hat, x_norms = scaled(passes, p.features, dtype)
    dx_hat = p.x.new_zeros(p.x.shape if wants.x else (0,), dtype=torch.float32)
    dx = dx_hat
    dw = p.w.new_empty(p.w.shape) if wants_w else p.w.new_empty(0, dtype=torch.float32)
    dscale = p.w.new_empty(held if wants.class_scale else 0, dtype=torch.float32)
    for chunk in _chunks(passes, p, dtype):
        weights = some_classes(p.weights, chunk)
        w_hat, w_norms = scaled(passes, weights, dtype)
        z = passes.product(x_hat, w_hat)
        what = LossPass(loss.first + chunk.start, take=False, sums=sums, gradient=True)
        passes.cross_entropy(z, loss, loss.of_all(held), what)
        if wants.x:
            dx_hat += passes.wide_product(z, w_hat.t())
            if chunk.stop == held:
                dx = dx_hat.to(p.x.dtype) if x_norms is None else passes.backward(p.features, dx_hat, x_norms, None)
                if ready is not None:
                    ready(dx)
        if not wants_w:
            continue
        dw_hat = passes.wide_product(z.t(), x_hat.t())
        if w_norms is not None:
            dw_hat = passes.backward(weights, dw_hat, w_norms, dscale[chunk] if wants.class_scale else None)
        dw[chunk] = dw_hat
    return dx, dw, dscale
