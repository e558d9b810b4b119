"""The cross entropy of a classifier whose classes lie on several ranks, each with features of its own.

Forward: features are gathered once, each rank takes its classes into what is known of every row's softmax, and these
six numbers a row are gathered. Backward: the features' gradient by the rank's own classes is summed over the ranks
while that of the weights is computed. Logits are never stored beyond the workspace of the fused loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tde_kernels import ops, reference
from tde_kernels.backends.grouped import Grouped, Loss, Wants
from tde_kernels.class_parallel.collectives import Group, SummedRows, gathered, merged_sums, ranks_of
from tde_kernels.normalizers import Classifier


class ShardedLosses(torch.autograd.Function):
    """Losses ``[P * b]`` of all ranks' rows, the same on every rank.

    The weights' gradient is that of the losses as they are weighted upstream, which must be alike on all ranks; the
    features' is ``P`` times it, since a data-parallel network takes the mean of its ranks' gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        class_scale: Tensor | None,
        features: Tensor,
        classifier: Classifier,
        loss: Loss,
        group: Group,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        """Losses.

        Args:
            x: ``[b, D]``, for its gradient; ``features [P * b, D]`` are those of all ranks.
            w: ``[c, D]``, the rank's own.
            loss: of all rows and classes, ``first`` and ``classes`` saying which of them are its own.
        """
        p = Grouped.of(features, w, classifier._replace(class_scale=class_scale)).detached()
        sums = ops.cross_entropy_sums(p, loss, dtype=dtype, backend=backend)
        parts = gathered(sums, group).unflatten(0, (ranks_of(group), -1))
        sums = merged_sums(parts)
        ctx.save_for_backward(*p.tensors, *loss[:7], sums)
        ctx.family, ctx.numbers = p[5:], loss[7:]
        ctx.group, ctx.dtype, ctx.backend = group, dtype, backend
        return ops.cross_entropy_losses(sums, loss, backend=backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("the fused loss has no second derivative; ask for backend='reference'")
        *tensors, sums = ctx.saved_tensors
        p, loss = Grouped(*tensors[:5], *ctx.family), Loss(*tensors[5:], *ctx.numbers)
        loss = loss._replace(share=loss.share * grad, share_b=None if loss.share_b is None else loss.share_b * grad)
        how = {"dtype": ctx.dtype, "backend": ctx.backend}
        wants_x, wants_w, wants_scale = ctx.needs_input_grad[:3]
        dx = dw = dscale = coming = None
        if wants_x:
            partial, _, _ = ops.cross_entropy_gradients(p, loss, sums, Wants(True, False, False), **how)
            coming = SummedRows(partial.float(), ctx.group)  # 16 bits would lose what the shards add up to
        if wants_w or wants_scale:
            _, dw, dscale = ops.cross_entropy_gradients(p, loss, sums, Wants(False, wants_w, wants_scale), **how)
        if coming is not None:
            dx = (coming.wait() * ranks_of(ctx.group)).to(p.x.dtype)
        return dx, dw if wants_w else None, dscale if wants_scale else None, *(None,) * 6


class OwnLosses(torch.autograd.Function):
    """This rank's ``[b]`` of the losses of all. Gradients of all ranks' are gathered, and their mean is meant."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, rank: int, group: Group) -> Tensor:
        ctx.group = group
        mine: Tensor = losses.unflatten(0, (ranks_of(group), -1))[rank]
        return mine.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gathered(grad, ctx.group) / ranks_of(ctx.group), None, None


class AllLosses(torch.autograd.Function):
    """Losses ``[P * b]`` of all ranks from one's own ``[b]``; of what comes back one's own part counts ``P`` times."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, rank: int, group: Group) -> Tensor:
        ctx.rank, ctx.ranks = rank, ranks_of(group)
        return gathered(losses, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.unflatten(0, (ctx.ranks, -1))[ctx.rank] * ctx.ranks, None, None


def own_losses(logits: Tensor, loss: Loss, rank: int) -> Tensor:
    """What ``loss``, of all ranks' rows, makes of one's own ``logits [b, C]``: ``[b]``, by the reference."""
    own = slice(rank * len(logits), (rank + 1) * len(logits))
    total = logits.new_zeros(len(logits))
    for target, share in ((loss.target, loss.share), (loss.target_b, loss.share_b)):
        if target is not None and share is not None:
            total = total + share[own] * reference.cross_entropy(
                logits,
                target[own],
                class_weight=loss.class_weight,
                logit_bias=loss.logit_bias,
                margin=loss.margin,
                label_smoothing=loss.label_smoothing,
                ignore_index=loss.ignore_index,
                focal_exponent=loss.focal_exponent,
                reduction="none",
            )
    return total
