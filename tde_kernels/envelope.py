"""The winner of Eq. 8 as a function of alpha: logits are lines in alpha, and their maximum a convex polygon."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Envelope(NamedTuple):
    """For each of N samples the classes that win, in the order in which they do, and from which alpha on.

    A class wins at most once. Sample ``b`` has the segments ``offsets[b]`` to ``offsets[b + 1]``; ``classes[s]`` wins
    from ``starts[s]`` to the next start, the last of a sample for good.
    """

    starts: Tensor  # [S] float64; the first of each sample is minus infinity
    classes: Tensor  # [S] int64
    offsets: Tensor  # [N + 1] int64

    @classmethod
    def packed(cls, starts: Tensor, classes: Tensor, counts: Tensor) -> Envelope:
        """From padded ``starts`` and ``classes [N, most]``, of which ``counts [N]`` are valid."""
        valid = torch.arange(starts.shape[1], device=starts.device) < counts[:, None]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(starts[valid], classes[valid], offsets)

    def samples(self) -> Tensor:
        """``[S]``: the sample of each segment."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def ends(self) -> Tensor:
        """``[S]``: where each segment ends; infinity for the last of a sample."""
        ends = torch.full_like(self.starts, torch.inf)
        ends[:-1] = self.starts[1:]
        ends[self.offsets[1:] - 1] = torch.inf
        return ends

    def at(self, alpha: float) -> Tensor:
        """The winners int64 ``[N]`` at one alpha; at a start exactly, the class that wins from there on."""
        return self.classes[(self.starts <= alpha) & (alpha < self.ends())]

    def wins(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """From where to where each sample's label wins: float64 ``[N]`` each; both infinity where it never does."""
        samples = self.samples()
        own = self.classes == labels[samples]
        begins, ends = (torch.full(labels.shape, torch.inf, dtype=torch.float64, device=labels.device) for _ in "be")
        begins[samples[own]], ends[samples[own]] = self.starts[own], self.ends()[own]
        return begins, ends


def segments(value: Tensor, slope: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The upper envelope of the lines ``value - alpha * slope``, both ``[N, C]``, by walking along it.

    Returns:
        ``starts [N, most]`` float64, ``classes [N, most]``, and ``counts [N]``, how many there are; of equal lines the
        first is taken.
    """
    value, slope = value.double(), slope.double()
    rows = value.shape[0]
    starts = torch.full((rows, most), torch.inf, dtype=torch.float64, device=value.device)
    classes = torch.zeros((rows, most), dtype=torch.int64, device=value.device)
    counts = torch.zeros(rows, dtype=torch.int64, device=value.device)
    steepest = slope == slope.amax(1, keepdim=True)
    current = torch.where(steepest, value, -torch.inf).argmax(1, keepdim=True)
    start = torch.full((rows, 1), -torch.inf, dtype=torch.float64, device=value.device)
    going = torch.arange(rows, device=value.device)
    step = 0
    while going.numel():
        if step < most:
            starts[going, step], classes[going, step] = start[:, 0], current[:, 0]
        step += 1
        counts[going] = step
        gap = slope[going].gather(1, current) - slope[going]
        crossing = torch.where(gap > 0, (value[going].gather(1, current) - value[going]) / gap, torch.inf)
        following = crossing.amin(1, keepdim=True)
        # of the lines that cross there, the one that descends least from there on
        overtaking = torch.where(crossing == following, gap, -torch.inf).argmax(1, keepdim=True)
        goes_on = (following < torch.inf)[:, 0]
        start = torch.maximum(start, following)[goes_on]  # rounding may put three lines' crossings out of order
        current, going = overtaking[goes_on], going[goes_on]
    return starts, classes, counts
