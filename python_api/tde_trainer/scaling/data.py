"""A long-tailed set of any number of classes that is kept nowhere: what a sample looks like follows from its class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of splitmix64, as int64
_STEP, _FIRST, _SECOND = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def zipf_labels(count: int, classes: int, seed: int) -> Tensor:
    """int64 ``[count]`` in 0 .. C - 1, ``P(c) = log(1 + 1/(c + 1)) / log(C + 1)``: about as 1/(c + 1), Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return (uniform * math.log1p(classes)).exp().long().clamp(1, classes) - 1


def class_means(labels: Tensor, channels: int) -> Tensor:
    """``[N, channels]`` of 1 and -1, a hash of class and channel: two classes agree in about half of them."""
    n = (labels[:, None] * channels + torch.arange(channels, device=labels.device)) * _STEP
    n = _mixed(n, 30) * _FIRST
    n = _mixed(n, 27) * _SECOND
    return torch.where(_mixed(n, 31) < 0, -1.0, 1.0)


def _mixed(n: Tensor, by: int) -> Tensor:
    """Exclusive or with its own upper bits; torch shifts copies of the sign in, which are none of them."""
    return n ^ ((n >> by) & ((1 << (64 - by)) - 1))


def samples(labels: Tensor, channels: int, noise: float, seed: int) -> Tensor:
    """``[N, channels]``: of every label its class's mean, and noise."""
    generator = torch.Generator().manual_seed(seed)
    return class_means(labels, channels) + noise * torch.randn(len(labels), channels, generator=generator)
