"""The scores by which alpha is chosen: of predictions at one alpha, or exactly, as a curve over all of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tde_kernels import checks
from tde_kernels.envelope import Envelope

Metric = Callable[[Tensor, Tensor], float]
NAMES = ("accuracy", "mean_per_class", "harmonic_mean_of_shots")
MANY, FEW = 100, 20  # training samples of a class: many are more than the one, few are fewer than the other


class Curve(NamedTuple):
    """A score as a function of alpha: ``scores[i]`` from ``starts[i]`` to the next start."""

    starts: Tensor  # [M] float64, ascending; the first is minus infinity
    scores: Tensor  # [M] float64

    def best(self) -> float:
        """An alpha, not negative, of the highest score: in the middle of the first interval that has it.

        Of an interval without an end, one unit above its start.
        """
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([torch.inf])])
        begins = self.starts.clamp_min(0)
        allowed = ends > begins
        begins, ends, scores = begins[allowed], ends[allowed], self.scores[allowed]
        first = int((scores >= scores.max() - 1e-12).nonzero()[0])  # sums of weights are rounded
        begin, end = float(begins[first]), float(ends[first])
        return begin + 1 if end == float("inf") else (begin + end) / 2


@dataclass(frozen=True)
class Score:
    """A metric that weighs the samples found, in groups, and takes the harmonic mean over groups; of one, itself."""

    weight: Tensor  # [N] float64: what a sample found is worth; those of a group sum to 1
    group: Tensor  # [N] int64
    groups: int

    @classmethod
    def named(cls, metric: str, y: Tensor, num_classes: int, class_counts: Tensor | Sequence[int] | None) -> Score:
        """The metric of that name for labels ``y [N]``; classes without a sample count for nothing."""
        if metric not in NAMES:
            nearest = difflib.get_close_matches(str(metric), NAMES, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"metric must be one of {', '.join(NAMES)} or a function, got {metric!r}{hint}")
        group = torch.zeros_like(y)
        if metric == "accuracy":
            return cls(torch.full(y.shape, 1 / len(y), dtype=torch.float64, device=y.device), group, 1)
        each = 1 / torch.bincount(y, minlength=num_classes).double()[y]
        if metric == "harmonic_mean_of_shots":
            counts = _counts(class_counts, num_classes).to(y.device)
            shot = (counts <= MANY).long() + (counts < FEW).long()
            present = shot[y].unique()
            group = torch.searchsorted(present, shot[y])
        groups = int(group.max()) + 1
        return cls(
            each / torch.zeros(groups, dtype=torch.float64, device=y.device).index_add_(0, group, each)[group],
            group,
            groups,
        )

    def _over_groups(self, found: Tensor) -> Tensor:
        """``[M]`` from the weight found in each group ``[M, G]``; 0 where a group has none."""
        return self.groups / (1 / found.clamp_min(0)).sum(-1)

    def of(self, correct: Tensor) -> float:
        """The score where ``correct [N]`` says which samples are found."""
        found = self.weight.new_zeros(self.groups).index_add_(0, self.group, self.weight * correct)
        return float(self._over_groups(found))

    def curve(self, envelope: Envelope, y: Tensor) -> Curve:
        """The score for every alpha: each sample is found on one interval, where its label wins."""
        begins, ends = envelope.wins(y)
        ever = begins < torch.inf
        begins, ends, group, weight = begins[ever], ends[ever], self.group[ever], self.weight[ever]
        at = torch.cat([begins.new_tensor([-torch.inf]), begins, ends])
        starts, place = at.unique(return_inverse=True)
        change = torch.zeros((len(starts), self.groups), dtype=torch.float64, device=y.device)
        change.index_put_((place[1:], torch.cat([group, group])), torch.cat([weight, -weight]), accumulate=True)
        finite = starts < torch.inf
        return Curve(starts[finite], self._over_groups(change.cumsum(0)[finite]))


def _counts(class_counts: Tensor | Sequence[int] | None, num_classes: int) -> Tensor:
    if class_counts is None:
        raise ValueError("class_counts [C] of the training set are wanted by metric='harmonic_mean_of_shots', got None")
    counts = torch.as_tensor(class_counts)
    checks.shaped(counts, (num_classes,), "class_counts")
    return counts


def resolve(
    metric: str | Metric, y: Tensor, num_classes: int, class_counts: Tensor | Sequence[int] | None = None
) -> Metric:
    """The metric of that name (see :data:`NAMES`) as a function of predictions and labels, or the function itself."""
    if callable(metric):
        return metric
    score = Score.named(metric, y, num_classes, class_counts)
    return lambda predicted, labels: score.of(predicted == labels)
