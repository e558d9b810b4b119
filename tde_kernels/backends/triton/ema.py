"""The EMA of the head direction, alone or riding along with the logits: column sums, folded in a fixed order.

Each row block leaves its column sums in memory and reports its arrival; whichever program of a column block comes
last adds them all up, block after block. No order of arrival changes a bit, and nothing waits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tde_kernels.backends import core
from tde_kernels.backends.triton import launch

_SUM = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64, "num_warps": 4, "num_stages": 2}
_FOLD = {"BLOCK": 256, "num_warps": 4, "num_stages": 2}


@triton.jit
def fold_columns(ema, sums, total, count, column, inside, momentum):
    """Writes the ``total`` of some columns to ``sums``, or their mean into ``ema``, whichever is not None."""
    if sums is not None:
        tl.store(sums + column, total, mask=inside)
    if ema is not None:
        old = tl.load(ema + column, mask=inside, other=0.0)
        new = momentum * old + total / tl.where(count > 0, count, 1.0)
        tl.store(ema + column, tl.where(count > 0, new, old), mask=inside)


@triton.jit
def fold_partials(
    ema,
    num_updates,
    sums,
    partial_sums,
    counts,
    arrivals,
    heads,
    width,
    momentum,
    blocks,
    share,
    shares,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Reports one row block's arrival for a ``share`` of the columns; the last to arrive folds that share.

    Args:
        partial_sums: ``[blocks, heads * width]``, counts: ``[shares, blocks]``, arrivals: ``[shares]`` int32, zero
            before and after.
        share: of the column blocks, ``cdiv(width, COLUMNS)`` to a head, every ``shares``-th from this one on.
    """
    tl.debug_barrier()  # all that this program wrote, before its arrival is seen
    before = tl.atomic_add(arrivals + share, 1, sem="acq_rel", scope="gpu")
    if before == blocks - 1:
        rows = tl.arange(0, ROWS)
        kept = tl.zeros((ROWS,), tl.float32)
        for start in range(0, blocks, ROWS):
            kept += tl.load(
                counts + tl.cast(share, tl.int64) * blocks + start + rows,
                mask=start + rows < blocks,
                other=0.0,
                cache_modifier=".cg",
            )
        count = tl.sum(kept, 0)
        per_head = tl.cdiv(width, COLUMNS)
        dim = heads * width
        for column_block in range(share, heads * per_head, shares):
            channel = column_block % per_head * COLUMNS + tl.arange(0, COLUMNS)
            inside = channel < width
            column = column_block // per_head * width + channel
            parts = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, blocks, ROWS):
                row = (start + rows).to(tl.int64)
                parts += tl.load(
                    partial_sums + row[:, None] * dim + column[None, :],
                    mask=(row < blocks)[:, None] & inside[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
            fold_columns(ema, sums, tl.sum(parts, 0), count, column, inside, momentum)
        if share == 0:
            if sums is not None:
                tl.store(sums + heads * width, count)
            if num_updates is not None:
                tl.store(num_updates, tl.load(num_updates) + (count > 0).to(tl.int64))
        tl.store(arrivals + share, 0)


@triton.jit
def _column_sums(
    x,
    mask,
    ema,
    num_updates,
    sums,
    partial_sums,
    counts,
    arrivals,
    batch,
    dim,
    stride_row,
    stride_column,
    momentum,
    blocks,
    column_blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    block = tl.program_id(0) // column_blocks
    share = tl.program_id(0) % column_blocks
    column = share * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < dim
    place = x + (column.to(tl.int64) * stride_column)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    kept = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(block * BLOCK_ROWS, batch, blocks * BLOCK_ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_ROWS)
        counted = row < batch
        if mask is not None:
            counted = tl.load(mask + row, mask=counted, other=0).to(tl.int1)
        tile = tl.load(place + (row * stride_row)[:, None], mask=counted[:, None] & inside[None, :], other=0.0)
        total += tile.to(tl.float32)
        kept += counted.to(tl.float32)
    tl.store(partial_sums + tl.cast(block, tl.int64) * dim + column, tl.sum(total, 0), mask=inside)
    tl.store(counts + tl.cast(share, tl.int64) * blocks + block, tl.sum(kept, 0))
    fold_partials(
        ema,
        num_updates,
        sums,
        partial_sums,
        counts,
        arrivals,
        1,
        dim,
        momentum,
        blocks,
        share,
        column_blocks,
        BLOCK_COLUMNS,
        BLOCK_ROWS,
    )


@triton.jit
def _fold(ema, num_updates, total, dim, momentum, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    count = tl.load(total + dim)
    fold_columns(ema, None, tl.load(total + column, mask=inside, other=0.0), count, column, inside, momentum)
    if num_updates is not None:
        if tl.program_id(0) == 0:
            tl.store(num_updates, tl.load(num_updates) + (count > 0).to(tl.int64))


_arrivals_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _arrivals(ema: Tensor | None, like: Tensor, shares: int) -> Tensor:
    """Zeros ``[shares]`` int32, which a kernel hands back as zeros: those of an EMA are kept, to save filling them.

    Work on one EMA is ordered by its caller, so no two kernels share them. A graph's own memory is not kept.
    """
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    kept = None if ema is None or capturing else _arrivals_of.get(ema)
    if kept is None or kept.shape[0] < shares or kept.device != like.device:
        kept = torch.zeros(shares, dtype=torch.int32, device=like.device)
        if ema is not None and not capturing:
            _arrivals_of[ema] = kept
    return kept


def sum_arguments(
    x: Tensor,
    ema: Tensor | None,
    num_updates: Tensor | None,
    momentum: float,
    take_sum: bool,
    *,
    blocks: int,
    shares: int,
) -> dict[str, Any]:
    """What a kernel needs to sum the columns of ``x [B, D]`` and fold them: all None where nobody asks."""
    names = ("ema", "num_updates", "sums", "partial_sums", "counts", "arrivals")
    if ema is None and not take_sum:
        return {"momentum": momentum, **dict.fromkeys(names)}
    dim = x.shape[1]
    memory = (
        x.new_empty(dim + 1, dtype=torch.float32) if take_sum else None,
        x.new_empty((blocks, dim), dtype=torch.float32),
        x.new_empty((shares, blocks), dtype=torch.float32),
        _arrivals(ema, x, shares),
    )
    if memory[0] is not None and blocks == 0:
        memory[0].zero_()
    return {"momentum": momentum, **dict(zip(names, (ema, num_updates, *memory), strict=True))}


def _sum_columns(
    x: Tensor, mask: Tensor | None, ema: Tensor | None, num_updates: Tensor | None, momentum: float
) -> Tensor | None:
    batch, dim = x.shape
    column_blocks = triton.cdiv(dim, _SUM["BLOCK_COLUMNS"])
    # enough programs to fill a device, few enough that the last one's share stays small
    blocks = min(triton.cdiv(batch, _SUM["BLOCK_ROWS"]), max(1, 512 // column_blocks))
    arguments = {
        **sum_arguments(x, ema, num_updates, momentum, ema is None, blocks=blocks, shares=column_blocks),
        "x": x,
        "mask": mask,
        "batch": batch,
        "dim": dim,
        "stride_row": x.stride(0),
        "stride_column": x.stride(1),
        "blocks": blocks,
        "column_blocks": column_blocks,
    }
    launch.run(_column_sums, blocks * column_blocks, x.device, arguments, _SUM)
    sums: Tensor | None = arguments["sums"]
    return sums


def feature_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``tde::feature_sum``."""
    sums = _sum_columns(x, mask, None, None, 0.0)
    assert sums is not None
    return sums


def update_ema_(ema: Tensor, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, *, momentum: float) -> None:
    """See ``tde::update_ema_``: one launch."""
    _sum_columns(x, mask, ema, num_updates, momentum)
    core.mark_written(ema, num_updates)


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float) -> None:
    """See ``tde::fold_ema_``."""
    dim = ema.shape[0]
    arguments = {"ema": ema, "num_updates": num_updates, "total": total, "dim": dim, "momentum": momentum}
    launch.run(_fold, triton.cdiv(dim, _FOLD["BLOCK"]), ema.device, arguments, _FOLD)
    core.mark_written(ema, num_updates)
