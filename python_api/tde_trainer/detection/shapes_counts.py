"""Which classes every image of the made set holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

LONG_TAIL_FROM = 600  # training images
PER_IMAGE = 5  # instances, at most; at least one where there are enough
BALANCED_PER_IMAGE = 3  # instances in a validation or test image, on average


def deal_splits(seed: int, images: Mapping[str, int], num_classes: int) -> dict[str, list[list[int]]]:
    """The labels 0 .. C - 1 in every image of each split: long-tailed in ``"train"``, balanced in the others.

    Which class has which place in the tail is random.
    """
    rng = default_rng(seed)
    dealt = {}
    for split, number in images.items():
        if split == "train":
            counts = rng.permutation(long_tailed_counts(number, num_classes))
        else:
            counts = balanced_counts(number, num_classes)
        dealt[split] = deal(rng.permutation(np.repeat(np.arange(num_classes), counts)), number, rng)
    return dealt


def long_tailed_counts(images: int, num_classes: int) -> NDArray[np.int64]:
    """Training instances per class from head to tail, ``[C]``: falling geometrically within each of three thirds.

    They keep off LVIS's bounds of 10 and 100 images, since some images hold two of a class.
    """
    thirds = [len(part) for part in np.array_split(np.arange(num_classes), 3)]
    tops = [(max(images / 3, 130), 130), (95, 13), (8, 2)]
    curve = np.concatenate([np.geomspace(*ends, n) for ends, n in zip(tops, thirds, strict=True)])
    return (curve * min(1, images / LONG_TAIL_FROM)).round().clip(1).astype(np.int64)


def balanced_counts(images: int, num_classes: int) -> NDArray[np.int64]:
    """Instances per class, ``[C]``, equal but for a remainder."""
    total = BALANCED_PER_IMAGE * images
    return np.array([len(part) for part in np.array_split(np.arange(total), num_classes)])


def deal(labels: NDArray[np.int64], images: int, rng: Generator) -> list[list[int]]:
    """Share ``labels`` out: one to every image as far as they go, the others at random, at most `PER_IMAGE` to any."""
    others = np.repeat(np.arange(images), PER_IMAGE - 1)
    places = np.concatenate([rng.permutation(images), rng.permutation(others)])
    dealt: list[list[int]] = [[] for _ in range(images)]
    for label, place in zip(labels.tolist(), places.tolist(), strict=False):
        dealt[place].append(label)
    return dealt
