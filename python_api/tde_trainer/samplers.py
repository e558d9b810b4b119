"""How often an epoch shows each class. An epoch has as many images as the training set, whatever the sampler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

IMAGES_OF_A_CLASS = 4  # in a row, by the class-aware sampler
SAMPLERS = ("instance", "class_aware", "square_root", "progressive")


def class_shares(sampler: str, class_counts: Tensor, done: float) -> Tensor:
    """Share of each class in what is drawn, ``[C]`` float64.

    Args:
        sampler: square_root: ``~ sqrt(n_c)``; progressive: from ``n_c / N`` to ``1 / C`` in the course of training.
        class_counts: ``[C]`` int64.
        done: share of the epochs that are over.
    """
    counts = class_counts.double()
    instance, uniform = counts / counts.sum(), torch.full_like(counts, 1 / len(counts))
    if sampler == "square_root":
        return counts.sqrt() / counts.sqrt().sum()
    return (1 - done) * instance + done * uniform


def classes_in_turn(num_classes: int, length: int, generator: torch.Generator) -> Tensor:
    """All classes in random order, then again in another, `IMAGES_OF_A_CLASS` times each: ``[length]`` int64."""
    turns = -(-length // (num_classes * IMAGES_OF_A_CLASS))
    order = torch.cat([torch.randperm(num_classes, generator=generator) for _ in range(turns)])
    return order.repeat_interleave(IMAGES_OF_A_CLASS)[:length]


def images_of(classes: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """An image of each of ``classes [n]``, int64; those of a class are all shown before one is shown again."""
    chosen = torch.empty_like(classes)
    by_class = classes.argsort(stable=True)
    wanted = classes.bincount(minlength=int(labels.max()) + 1).tolist()
    members_by_class = labels.argsort(stable=True).split(labels.bincount().tolist())
    for places, members in zip(by_class.split(wanted), members_by_class, strict=True):
        rounds = -(-len(places) // len(members)) if len(places) else 0
        shuffled = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
        if shuffled:
            chosen[places] = torch.cat(shuffled)[: len(places)]
    return chosen


class ClassSampler(Sampler[int]):
    """Draws classes, then images of them; the same on every rank.

    Args:
        name: one of `SAMPLERS` but instance, which is a data loader's own shuffling.
        labels: ``[N]`` int64, every class with at least one image.
        seed: of the training.
        epochs: that the training takes.
    """

    def __init__(self, name: str, labels: Tensor, seed: int, epochs: int) -> None:
        self.name, self.labels, self.seed, self.epochs = name, labels, seed, epochs
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """What is drawn depends on seed and epoch alone."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * (self.epochs + 1) + self.epoch)
        counts = self.labels.bincount()
        if self.name == "class_aware":
            classes = classes_in_turn(len(counts), len(self), generator)
        else:
            shares = class_shares(self.name, counts, self.epoch / self.epochs)
            classes = torch.multinomial(shares, len(self), replacement=True, generator=generator)
        yield from images_of(classes, self.labels, generator).tolist()
