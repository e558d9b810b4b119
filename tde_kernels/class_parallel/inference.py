"""Predictions from classes on several ranks: each looks among its own for all ranks' rows, then they are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels import reference
from tde_kernels.class_parallel.collectives import Ranks, own_rows
from tde_kernels.class_parallel.shards import Shards
from tde_kernels.normalizers import Classifier

_WORKSPACE = 64 << 20  # bytes of logits at a time


def merged_topk(values: Tensor, classes: Tensor, topk: int, shards: Shards, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The ``topk`` largest ``[b, topk]`` of this rank's rows, and their classes, ties to the lowest.

    Args:
        values: ``[P * b, min(topk, c)]``, the largest among this rank's classes for all ranks' rows; their ``classes``.
    """
    widths = [min(topk, size) for size in shards.sizes]
    values, classes = (own_rows(found, widths, ranks) for found in (values, classes))
    best, places = reference.lowest_topk(values, topk)  # shards are in order, and stay so where values tie
    return best, classes.gather(1, places)


def merged_winners(values: Tensor, classes: Tensor, ranks: Ranks) -> Tensor:
    """The best class int64 ``[A, b]`` of this rank's rows, of each shard's best ``[P * b, A]``; ties to the lowest."""
    widths = [values.shape[1]] * ranks.size
    values, classes = (own_rows(a, widths, ranks).unflatten(1, (ranks.size, -1)) for a in (values, classes))
    first = (values == values.amax(1, keepdim=True)).int().argmax(1, keepdim=True)  # argmax takes the first of equals
    return classes.gather(1, first).squeeze(1).t().contiguous()


def winners(
    rows: Tensor, w: Tensor, direction: Tensor, classifier: Classifier, alphas: Tensor
) -> tuple[Tensor, Tensor]:
    """For ``rows [B, D]`` and every alpha the largest logit of Eq. 8 and its place in ``w [c, D]``, both ``[B, A]``.

    By one product for all alphas, of some rows at a time.
    """
    some = max(1, _WORKSPACE // (4 * w.shape[0]))
    found = [_winners(part, w, direction, classifier, alphas) for part in rows.split(some)]
    values, places = zip(*found, strict=True)
    return torch.cat(values), torch.cat(places)


def _winners(
    rows: Tensor, w: Tensor, direction: Tensor, classifier: Classifier, alphas: Tensor
) -> tuple[Tensor, Tensor]:
    total, along_x, along_w = reference.effects(rows, w, direction, classifier)
    correction = reference.product(along_x, along_w)
    values = total.new_empty(len(rows), len(alphas))
    places = torch.empty_like(values, dtype=torch.int64)
    for step, alpha in enumerate(alphas):
        values[:, step], places[:, step] = torch.max(total - alpha * correction, 1)  # the first of equals
    return values, places
