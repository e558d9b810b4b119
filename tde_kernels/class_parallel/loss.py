"""The cross entropy of a classifier whose classes lie on several ranks, each with features of its own.

    losses[b] = sum_t share_t[b] CE(z_b, target_t[b]),   z_b the logits of all ranks' classes

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
from tde_kernels.class_parallel.collectives import Ranks, SummedRows, gathered
from tde_kernels.normalizers import Classifier
from tde_kernels.ops.cross_entropy import refuse_second_derivative


def merged_sums(parts: Tensor) -> Tensor:
    """What shards know of each row's softmax, as one: ``[B, 6]`` of ``parts [P, B, 6]`` of float32.

    The numbers are those of ``csrc/include/tde/cross_entropy.h``: peak, sum of exponentials less the peak, weighted
    distance below the peak, weight, and the two labels' logits, each 0 but for the shard that holds the label. The
    order of summation is that of the ranks, so that all come to the same bits.
    """
    peaks, sums, below, weight = parts[..., :4].unbind(-1)
    peak = peaks.amax(0)
    base, bases = (torch.where(p == -torch.inf, 0.0, p) for p in (peak, peaks))
    lowered = torch.where(weight == 0, 0.0, weight * (base - bases))
    columns = [peak, (sums * (peaks - base).exp()).sum(0), (below + lowered).sum(0), weight.sum(0)]
    return torch.cat([torch.stack(columns, -1), parts[..., 4:].sum(0)], -1)


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
        ranks: Ranks,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        """Losses.

        Args:
            x: ``[b, D]``, for its gradient; ``features [P * b, D]`` are those of all ranks.
            w: ``[c, D]``, the rank's own; ``class_scale [c]`` too.
            loss: of all rows and classes, ``first`` and ``classes`` saying which of them are its own.
            dtype: of the product.
        """
        p = Grouped.of(features, w, classifier._replace(class_scale=class_scale)).detached()
        sums = ops.cross_entropy_sums(_wide(p), loss, dtype=dtype, backend=backend)
        sums = merged_sums(gathered(sums, ranks).unflatten(0, (ranks.size, -1)))
        ctx.save_for_backward(*p.tensors, *loss[:7], sums)
        ctx.family, ctx.numbers = p[5:], loss[7:]
        ctx.ranks, ctx.dtype, ctx.backend = ranks, dtype, backend
        return ops.cross_entropy_losses(sums, loss, backend=backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *tensors, sums = ctx.saved_tensors
        p, loss = Grouped(*tensors[:5], *ctx.family), Loss(*tensors[5:], *ctx.numbers)
        loss = loss._replace(share=loss.share * grad, share_b=None if loss.share_b is None else loss.share_b * grad)
        wants = Wants(*ctx.needs_input_grad[:3])
        coming: list[SummedRows] = []
        dw, dscale = ops.cross_entropy_gradients(
            _wide(p),
            loss,
            sums,
            wants,
            dtype=ctx.dtype,
            backend=ctx.backend,
            ready=lambda partial: coming.append(SummedRows(partial, ctx.ranks)),
        )
        dx = (coming[0].wait() * ctx.ranks.size).to(p.x.dtype) if wants.x else None
        scale = dscale.to(p.class_scale.dtype) if p.class_scale is not None and wants.class_scale else None
        return dx, dw if wants.w else None, scale, *(None,) * 6


def _wide(p: Grouped) -> Grouped:
    """With features in float32, and so their gradient, which the shards add up to: 16 bits would lose of it."""
    return p._replace(x=p.x.float())


class OwnLosses(torch.autograd.Function):
    """This rank's ``[b]`` of the losses of all. Gradients of all ranks' are gathered, and their mean is meant."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        mine: Tensor = losses.unflatten(0, (ranks.size, -1))[ranks.rank]
        return mine.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gathered(grad, ctx.ranks) / ctx.ranks.size, None


class AllLosses(torch.autograd.Function):
    """Losses ``[P * b]`` of all ranks from one's own ``[b]``; of what comes back one's own part counts ``P`` times."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return gathered(losses, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.unflatten(0, (ctx.ranks.size, -1))[ctx.ranks.rank] * ctx.ranks.size, None


def own_losses(logits: Tensor, loss: Loss, rank: int) -> Tensor:
    """What ``loss``, of all ranks' rows, makes of one's own ``logits [b, C]``: ``[b]``, by the reference."""
    own = slice(rank * len(logits), (rank + 1) * len(logits))
    total = torch.zeros((), device=logits.device)
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
