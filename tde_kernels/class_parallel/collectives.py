"""The messages of a class-parallel head, each one collective of its group."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name of torch 2.14 and later
_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, and the place of this one among them."""

    group: dist.ProcessGroup | None = None  # None: this process alone
    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """Those of ``group``, by default of all processes; where none were begun, this one alone.

        Raises:
            ValueError: processes were launched, or a group is given, and ``torch.distributed`` was not initialised; or
                this process is not in the group.
        """
        if not dist.is_initialized():
            if group is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError("group must be initialised: call torch.distributed.init_process_group() first")
            return cls()
        group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"group must hold this process, got one without rank {dist.get_rank()}")
        return cls(group, dist.get_world_size(group), rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # copies of a module speak in the same group


def gathered(rows: Tensor, ranks: Ranks) -> Tensor:
    """``[P * b, ...]`` of every rank's ``rows [b, ...]``, in the order of the ranks."""
    if ranks.size == 1:
        return rows
    found = rows.new_empty(ranks.size * rows.shape[0], *rows.shape[1:])
    _gather(found, rows.contiguous(), group=ranks.group)
    return found


class SummedRows:
    """A sum over the ranks on its way, of which each receives its own rows."""

    def __init__(self, rows: Tensor, ranks: Ranks) -> None:
        """Begin to sum ``rows [P * b, D]``."""
        self._rows, self._work = rows, None
        if ranks.size > 1:
            self._sent = rows  # must live until the sum is there
            self._rows = rows.new_empty(rows.shape[0] // ranks.size, *rows.shape[1:])
            self._work = _scatter(self._rows, rows, group=ranks.group, async_op=True)

    def wait(self) -> Tensor:
        """This rank's rows ``[b, D]`` of the sum."""
        if self._work is not None:
            self._work.wait()
        return self._rows


def agree(described: dict[str, Any], ranks: Ranks, digest_on: torch.device | None = None) -> None:
    """Whether all ranks describe the same thing.

    Args:
        described: by name. What is called ``error`` is one rank's and is raised on all.
        digest_on: a device to compare eight bytes on first, which is all that is sent where ranks agree.

    Raises:
        ValueError: they do not; on every rank.
    """
    if ranks.size == 1:
        return
    if digest_on is not None:
        digest = torch.tensor([zlib.crc32(repr(described).encode())], device=digest_on)
        if bool((gathered(digest, ranks) == digest).all()):
            return
    found: list[dict[str, Any]] = [{}] * ranks.size
    dist.all_gather_object(found, described, group=ranks.group)
    for rank, other in enumerate(found):
        if other.get("error") is not None:
            raise ValueError(f"rank {rank} of the group: {other['error']}")
    for key in dict.fromkeys(key for other in found for key in other):
        values = [repr(other.get(key)) for other in found]
        if len(set(values)) > 1:
            got = ", ".join(values)
            raise ValueError(f"all ranks of the group must have the same {key}, got {got} in the order of the ranks")


def agree_over(described: dict[str, Any], *groups: Ranks) -> None:
    """:func:`agree` over each dimension of a mesh, such that what is wrong anywhere is raised everywhere."""
    error: str | None = None
    for ranks in groups:
        try:
            agree({**described, "error": error}, ranks)
        except ValueError as found:
            error = str(found)
    if error is not None:
        raise ValueError(error)


def first_of(value: int, ranks: Ranks) -> int:
    """The first rank's ``value``."""
    if ranks.size == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, group=ranks.group, group_src=0)
    return told[0]


class AllRows(torch.autograd.Function):
    """``[P * b, D]`` of every rank's ``x [b, D]``; what comes back is summed over the ranks, times their number.

    So the gradients of a data-parallel network, whose mean over ranks is taken, are those of what all ranks compute
    together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return gathered(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide = grad if grad.dtype == torch.float64 else grad.float()
        own = SummedRows(wide.contiguous(), ctx.ranks).wait() * ctx.ranks.size
        return own.to(grad.dtype), None


class OwnRows(torch.autograd.Function):
    """From columns ``[P * b, c]`` of all ranks' rows to all columns ``[b, sum(widths)]`` of one's own.

    What comes back is the mean over ranks, as a data-parallel network takes it.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, widths: list[int], ranks: Ranks) -> Tensor:
        ctx.widths, ctx.ranks = widths, ranks
        return own_rows(columns, widths, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return own_columns(grad, ctx.widths, ctx.ranks) / ctx.ranks.size, None, None


class Averaged(torch.autograd.Function):
    """A parameter as it is, whose gradient is the mean over ranks that hold the same."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.ranks.group)
        return total.div_(ctx.ranks.size), None


def own_rows(columns: Tensor, widths: list[int], ranks: Ranks) -> Tensor:
    """See :class:`OwnRows`; ``widths [P]`` are the numbers of columns of the ranks."""
    if ranks.size == 1:
        return columns
    own = columns.shape[0] // ranks.size
    found = columns.new_empty(own * sum(widths))
    sent = [own * columns.shape[1]] * ranks.size
    dist.all_to_all_single(found, columns.reshape(-1), [own * width for width in widths], sent, group=ranks.group)
    parts = found.split([own * width for width in widths])
    return torch.cat([part.view(own, width) for part, width in zip(parts, widths, strict=True)], 1)


def own_columns(rows: Tensor, widths: list[int], ranks: Ranks) -> Tensor:
    """The way back: columns ``[P * b, c]`` of all ranks' rows from all columns of one's own ``[b, sum(widths)]``."""
    if ranks.size == 1:
        return rows
    own, width = rows.shape[0], widths[ranks.rank]
    found = rows.new_empty(ranks.size * own, width)
    sent = torch.cat([part.reshape(-1) for part in rows.split(widths, 1)])
    received = [own * width] * ranks.size
    dist.all_to_all_single(found.view(-1), sent, received, [own * width for width in widths], group=ranks.group)
    return found
