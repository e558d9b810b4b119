"""The messages of a class-parallel head, each one collective of its group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Group = dist.ProcessGroup | None
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name of torch 2.14 and later
_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def ranks_of(group: Group) -> int:
    """Number of ranks; 1 where no process group was begun."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank_in(group: Group) -> int:
    """This process's place."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def gathered(rows: Tensor, group: Group) -> Tensor:
    """``[P * b, ...]`` of every rank's ``rows [b, ...]``, in the order of the ranks."""
    ranks = ranks_of(group)
    if ranks == 1:
        return rows
    found = rows.new_empty(ranks * rows.shape[0], *rows.shape[1:])
    _gather(found, rows.contiguous(), group=group)
    return found


class SummedRows:
    """A sum over the ranks on its way, of which each receives its own rows."""

    def __init__(self, rows: Tensor, group: Group) -> None:
        """Begin to sum ``rows [P * b, D]``."""
        ranks = ranks_of(group)
        self._rows, self._work = rows, None
        if ranks > 1:
            self._sent = rows  # must live until the sum is there
            self._rows = rows.new_empty(rows.shape[0] // ranks, *rows.shape[1:])
            self._work = _scatter(self._rows, rows, group=group, async_op=True)

    def wait(self) -> Tensor:
        """This rank's rows ``[b, D]`` of the sum."""
        if self._work is not None:
            self._work.wait()
        return self._rows


def agree(described: dict[str, Any], group: Group) -> None:
    """Whether all ranks describe the same thing; a message of a few bytes.

    Raises:
        ValueError: they do not; on every rank.
    """
    if ranks_of(group) == 1:
        return
    found: list[Any] = [None] * ranks_of(group)
    dist.all_gather_object(found, described, group=group)
    for key, wanted in found[0].items():
        values = [other[key] for other in found]
        if any(value != wanted for value in values):
            raise ValueError(f"all ranks of the group must have the same {key}, got {values} in the order of the ranks")


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


class AllRows(torch.autograd.Function):
    """``[P * b, D]`` of every rank's ``x [b, D]``; what comes back is summed over the ranks, times their number.

    So the gradients of a data-parallel network, whose mean over ranks is taken, are those of what all ranks compute
    together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = SummedRows(grad.float().contiguous(), ctx.group).wait() * ranks_of(ctx.group)
        return own.to(grad.dtype), None


class OwnRows(torch.autograd.Function):
    """From columns ``[P * b, c]`` of all ranks' rows to all columns ``[b, sum(widths)]`` of one's own.

    What comes back is the mean over ranks, as a data-parallel network takes it.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, widths: list[int], group: Group) -> Tensor:
        ctx.widths, ctx.group = widths, group
        return own_rows(columns, widths, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return own_columns(grad, ctx.widths, ctx.group) / ranks_of(ctx.group), None, None


def own_rows(columns: Tensor, widths: list[int], group: Group) -> Tensor:
    """See :class:`OwnRows`; ``widths [P]`` are the numbers of columns of the ranks."""
    if len(widths) == 1:
        return columns
    own = columns.shape[0] // len(widths)
    found = columns.new_empty(own * sum(widths))
    sent = [own * columns.shape[1]] * len(widths)
    dist.all_to_all_single(found, columns.reshape(-1), [own * width for width in widths], sent, group=group)
    parts = found.split([own * width for width in widths])
    return torch.cat([part.view(own, width) for part, width in zip(parts, widths, strict=True)], 1)


def own_columns(rows: Tensor, widths: list[int], group: Group) -> Tensor:
    """The way back: columns ``[P * b, c]`` of all ranks' rows from all columns of one's own ``[b, sum(widths)]``."""
    if len(widths) == 1:
        return rows
    own, width = rows.shape[0], widths[rank_in(group)]
    found = rows.new_empty(len(widths) * own, width)
    sent = torch.cat([part.reshape(-1) for part in rows.split(widths, 1)])
    received = [own * width] * len(widths)
    dist.all_to_all_single(found.view(-1), sent, received, [own * width for width in widths], group=group)
    return found
