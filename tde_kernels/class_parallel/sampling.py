"""Sampled negatives (Partial FC): each step looks at all classes that the batch holds, and at some of the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tde_kernels.backends.grouped import Loss
from tde_kernels.class_parallel.shards import Shards


class Sample(NamedTuple):
    """The classes that a step looks at: on this rank, and how the loss names them."""

    own: Tensor  # [n] int64: places in the rank's shard
    sizes: list[int]  # of every rank's
    loss: Loss  # of all of them


def sample(loss: Loss, shards: Shards, rank: int, rate: float, generator: torch.Generator) -> Sample:
    """Every class that is a label, and others at random, up to ``rate`` of each shard.

    Where every rank has put the labels follows from the labels, so that no message is needed: a shard's labels come
    first, in order.

    Args:
        loss: of all rows and classes.
        generator: the rank's own.
    """
    labels = [loss.target] if loss.target_b is None else [loss.target, loss.target_b]
    everything = torch.cat(labels)
    sizes = [min(size, max(len(everything), round(rate * size))) for size in shards.sizes]
    first, held = sum(sizes[:rank]), shards.of(rank)

    # In float64: the labels' order is that of the classes, before all others, whose order is random
    order = torch.rand(len(held) + 1, generator=generator, device=everything.device, dtype=torch.float64)
    places = _places(everything, held)
    order[places] = 2 - places.double() / (len(held) + 1)
    own = order[:-1].topk(sizes[rank]).indices

    renamed, begin = torch.full_like(everything, loss.ignore_index), 0
    for other, size in enumerate(sizes):
        places = _places(everything, shards.of(other))
        present = places.new_zeros(len(shards.of(other)) + 1)
        present[places] = 1
        inside = places < len(shards.of(other))
        renamed = torch.where(inside, begin + (present.cumsum(0) - 1)[places], renamed)
        begin += size

    def chosen(vector: Tensor | None) -> Tensor | None:
        """Of a class vector, what is looked at here: the rank's own classes, and all labels."""
        if vector is None:
            return None
        found = vector.new_zeros(sum(sizes))
        found[first : first + len(own)] = vector[held.start + own]
        known = renamed != loss.ignore_index
        found[torch.where(known, renamed, first)] = vector[torch.where(known, everything, held.start + own[0])]
        return found

    target, *others = renamed.split(len(loss.target))
    return Sample(
        own,
        sizes,
        loss._replace(
            target=target,
            target_b=others[0] if others else None,
            class_weight=chosen(loss.class_weight),
            logit_bias=chosen(loss.logit_bias),
            margin=chosen(loss.margin),
            first=first,
            classes=sum(sizes),
        ),
    )


def _places(labels: Tensor, held: range) -> Tensor:
    """Of labels in a shard; its length where they are not in it."""
    inside = (labels >= held.start) & (labels < held.stop)
    return torch.where(inside, labels - held.start, len(held))
