"""Losses of a detector's classifier: sampled boxes, most of them background, and few of the rare classes.

Labels are torchvision's: 0 is background, 1 .. C are classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf


def equalization_loss(logits: Tensor, labels: Tensor, rare: Tensor) -> Tensor:
    """EQL: a sigmoid for every class, in which boxes of other classes spare the rare ones; background does not.

    ``sum_ij w_ij * BCE(z_ij, y_ij) / N`` with ``w_ij = 1 - E_i * T_j * (1 - y_ij)``: ``E`` is 1 for foreground, ``T``
    for rare classes. Of no box at all it is 0.

    Args:
        logits: ``[N, C]``; the background has none.
        labels: ``[N]`` int64, 0 .. C.
        rare: bool ``[C]``.
    """
    target = nnf.one_hot(labels, logits.shape[1] + 1)[:, 1:].to(logits.dtype)
    spared = (labels > 0)[:, None] & rare & (target == 0)
    losses = nnf.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return losses.masked_fill(spared, 0.0).sum() / max(len(labels), 1)


def softmax_equalization_loss(logits: Tensor, labels: Tensor, rare: Tensor, beta: float) -> Tensor:
    """Softmax EQL: rare classes are left out of the sum of another class's softmax, each with probability beta.

    The mean over boxes of ``-log(e^z_iy / sum_j w_ij e^z_ij)`` with ``w_ij = 1 - b_ij * T_j * (1 - y_ij)``, ``b`` drawn
    anew for every box and class, ``T`` as above; the background is always in the sum. Of no box at all it is 0.

    Args:
        logits: ``[N, 1 + C]``, the background first.
        labels: ``[N]`` int64, 0 .. C.
        rare: bool ``[C]``.
        beta: probability.
    """
    may_go = nnf.pad(rare, (1, 0)) & (nnf.one_hot(labels, logits.shape[1]) == 0)
    gone = may_go & (torch.rand_like(logits, dtype=torch.float32) < beta)
    kept = logits.float().masked_fill(gone, -torch.inf)
    return nnf.cross_entropy(kept, labels, reduction="sum") / max(len(labels), 1)
