"""The EMA of the head direction, alone or riding along with the logits: column sums, folded in a fixed order.

Each row block leaves its column sums in memory and reports its arrival; whichever program of a column block comes
last adds them all up, block after block. No order of arrival changes a bit, and nothing waits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.arrivals import arrivals
from tde_kernels.backends.grouped import Intake
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


class Update(NamedTuple):
    """What a kernel that sums columns needs: ``blocks`` of rows, ``shares`` of the columns."""

    mask: Any  # [B] bool; None takes in every row
    sums: Any  # [D + 1] float32, or None where nobody asks for the sum itself
    partial_sums: Any  # [blocks, D] float32
    counts: Any  # [shares, blocks] float32
    arrivals: Any  # [shares] int32, zero before and after
    momentum: Any


@triton.jit
def fold_partials(
    update,
    ema,
    num_updates,
    heads,
    width,
    blocks,
    share,
    shares,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Reports one row block's arrival for a ``share`` of the columns; the last to arrive folds that share.

    It consists of every ``shares``-th column block from this one on, ``cdiv(width, COLUMNS)`` of them to a head.
    """
    tl.debug_barrier()  # all that this program wrote, before its arrival is seen
    before = tl.atomic_add(update.arrivals + share, 1, sem="acq_rel", scope="gpu")
    if before == blocks - 1:
        rows = tl.arange(0, ROWS)
        kept = tl.zeros((ROWS,), tl.float32)
        for start in range(0, blocks, ROWS):
            kept += tl.load(
                update.counts + tl.cast(share, tl.int64) * blocks + start + rows,
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
                    update.partial_sums + row[:, None] * dim + column[None, :],
                    mask=(row < blocks)[:, None] & inside[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
            fold_columns(ema, update.sums, tl.sum(parts, 0), count, column, inside, update.momentum)
        if share == 0:
            if update.sums is not None:
                tl.store(update.sums + heads * width, count)
            if num_updates is not None:
                tl.store(num_updates, tl.load(num_updates) + (count > 0).to(tl.int64))
        tl.store(update.arrivals + share, 0)


@triton.jit
def _column_sums(
    x,
    update,
    ema,
    num_updates,
    batch,
    dim,
    stride_row,
    stride_column,
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
        if update.mask is not None:
            counted = tl.load(update.mask + row, mask=counted, other=0).to(tl.int1)
        tile = tl.load(place + (row * stride_row)[:, None], mask=counted[:, None] & inside[None, :], other=0.0)
        total += tile.to(tl.float32)
        kept += counted.to(tl.float32)
    tl.store(update.partial_sums + tl.cast(block, tl.int64) * dim + column, tl.sum(total, 0), mask=inside)
    tl.store(update.counts + tl.cast(share, tl.int64) * blocks + block, tl.sum(kept, 0))
    fold_partials(update, ema, num_updates, 1, dim, blocks, share, column_blocks, BLOCK_COLUMNS, BLOCK_ROWS)


@triton.jit
def _fold(ema, num_updates, total, dim, momentum, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    count = tl.load(total + dim)
    fold_columns(ema, None, tl.load(total + column, mask=inside, other=0.0), count, column, inside, momentum)
    if num_updates is not None:
        if tl.program_id(0) == 0:
            tl.store(num_updates, tl.load(num_updates) + (count > 0).to(tl.int64))


def update_of(x: Tensor, intake: Intake, *, blocks: int, shares: int) -> Update | None:
    """Memory for summing the columns of ``x [B, D]``; None where nobody wants the EMA or the sum."""
    if not intake.asked:
        return None
    dim = x.shape[1]
    sums = x.new_empty(dim + 1, dtype=torch.float32) if intake.take_sum else None
    if sums is not None and blocks == 0:  # no program will write it
        sums.zero_()
    partial_sums = x.new_empty((blocks, dim), dtype=torch.float32)
    counts = x.new_empty((shares, blocks), dtype=torch.float32)
    return Update(intake.mask, sums, partial_sums, counts, arrivals(x, shares), intake.momentum)


def take_in(x: Tensor, intake: Intake) -> Tensor | None:
    """Does with ``x [B, D]`` what the intake asks for, in one launch; the sum ``[D + 1]`` if that is wanted."""
    if not intake.asked:
        return None
    batch, dim = x.shape
    column_blocks = triton.cdiv(dim, _SUM["BLOCK_COLUMNS"])
    # enough programs to fill a device, few enough that the last one's share stays small
    blocks = min(triton.cdiv(batch, _SUM["BLOCK_ROWS"]), max(1, 512 // column_blocks))
    update = update_of(x, intake, blocks=blocks, shares=column_blocks)
    arguments = {
        "x": x,
        "update": update,
        "ema": intake.ema,
        "num_updates": intake.num_updates,
        "batch": batch,
        "dim": dim,
        "stride_row": x.stride(0),
        "stride_column": x.stride(1),
        "blocks": blocks,
        "column_blocks": column_blocks,
    }
    core.mark_written(intake.ema, intake.num_updates)
    launch.run(_column_sums, blocks * column_blocks, x.device, arguments, _SUM)
    return None if update is None else update.sums


def feature_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``tde::feature_sum``."""
    sums = take_in(x, Intake(mask, take_sum=True))
    assert sums is not None
    return sums


def update_ema_(ema: Tensor, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, *, momentum: float) -> None:
    """See ``tde::update_ema_``: one launch."""
    take_in(x, Intake(mask, ema, num_updates, momentum))


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float) -> None:
    """See ``tde::fold_ema_``."""
    dim = ema.shape[0]
    arguments = {"ema": ema, "num_updates": num_updates, "total": total, "dim": dim, "momentum": momentum}
    core.mark_written(ema, num_updates)
    launch.run(_fold, triton.cdiv(dim, _FOLD["BLOCK"]), ema.device, arguments, _FOLD)
