"""Sampled negatives (Partial FC): each step looks at all classes that the batch holds, and at some of the others.

Which others is a function of seed, step and class alone, hashed on the device: nobody is told, no generator is kept in
step, and a run that is resumed, or on another number of ranks, draws as it would have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tde_kernels.backends.grouped import Loss
from tde_kernels.class_parallel.shards import Shards

_IGNORED, _NO_CLASS = -100, -1  # labels of the sample
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the three constants of SplitMix64, as int64 holds them
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_LABEL = 1 << 62  # above every random number


class Draw(NamedTuple):
    """What a sample depends on, beside the batch."""

    rate: float  # of each shard's classes
    seed: int
    step: Tensor  # int64 0-d
    all_vectors: bool  # whether class vectors are wanted for all ranks' samples; else for this rank's and the labels


class Sample(NamedTuple):
    """The classes that a step looks at: on this rank, and how the loss names them."""

    own: Tensor  # [n] int64: places in the rank's shard
    sizes: list[int]  # of every rank's
    loss: Loss  # of all of them


def sample(loss: Loss, shards: Shards, rank: int, draw: Draw) -> Sample:
    """Every class that is a label, and others at random, up to the rate of each shard.

    A shard's sample holds at least as many classes as the batch has labels, for all of them may be its own: how many
    are is not known without waiting for the device. Its labels come first, in order, so that every rank knows where
    the others have put them.

    Args:
        loss: of all rows and classes.
    """
    labels = loss.target if loss.target_b is None else torch.cat([loss.target, loss.target_b])
    ignored = labels == loss.ignore_index
    known = (labels >= 0) & (labels < shards.classes) & ~ignored
    sizes = [min(size, max(1, len(labels), round(draw.rate * size))) for size in shards.sizes]
    begins = [r * sizes[0] for r in range(shards.ranks)]  # all shards but the last are equal
    places = _places(torch.where(known, labels, shards.classes), shards, sizes[0])
    renamed = torch.where(known, places, torch.where(ignored, _IGNORED, _NO_CLASS))

    key = _mixed(_mixed(draw.step.new_full((), draw.seed)) + draw.step)
    looked_at = range(shards.ranks) if draw.all_vectors else [rank]
    drawn = {r: _drawn(labels, known, shards.of(r), sizes[r], key) for r in looked_at}
    own, held = drawn[rank], shards.of(rank)
    columns = labels.new_zeros(sum(sizes))  # the class of each column, where it is known here
    for r, some in drawn.items():
        columns[begins[r] : begins[r] + sizes[r]] = shards.of(r).start + some
    columns[torch.where(known, renamed, begins[rank])] = torch.where(known, labels, held.start + own[0])

    def chosen(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[columns]

    rows = len(loss.target)
    changed = loss._replace(
        target=renamed[:rows],
        target_b=None if loss.target_b is None else renamed[rows:],
        class_weight=chosen(loss.class_weight),
        logit_bias=chosen(loss.logit_bias),
        margin=chosen(loss.margin),
        ignore_index=_IGNORED,
        first=begins[rank],
        classes=sum(sizes),
    )
    return Sample(own, sizes, changed)


def _places(labels: Tensor, shards: Shards, size: int) -> Tensor:
    """Where in the sample each label is: after its shard's begin, as many places as there are lower labels in it."""
    ordered, order = labels.sort()
    new = torch.ones_like(ordered)
    new[1:] = ordered[1:] != ordered[:-1]
    lower = new.cumsum(0) - 1  # distinct labels below
    shard = ordered // shards.each
    first = torch.searchsorted(ordered, shard * shards.each)  # of the labels in its shard
    return torch.empty_like(labels).scatter_(0, order, shard * size + lower - lower[first])


def _drawn(labels: Tensor, known: Tensor, held: range, size: int, key: Tensor) -> Tensor:
    """Places in a shard ``[size]``: its labels in ascending order, then random others."""
    classes = torch.arange(held.start, held.stop + 1, device=labels.device)  # the last is nobody's
    rank = _mixed(key + _GOLDEN * classes) & (_LABEL - 1)
    inside = known & (labels >= held.start) & (labels < held.stop)
    rank[torch.where(inside, labels - held.start, len(held))] = torch.where(inside, _LABEL + held.stop - labels, 0)
    return rank[:-1].topk(size).indices


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's function of int64, all of whose bits depend on all."""

    def shifted(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = (z ^ shifted(z, 30)) * _FIRST
    z = (z ^ shifted(z, 27)) * _SECOND
    return z ^ shifted(z, 31)
