"""The device function that every forward kernel shares: one tile of Eq. 7 and of its counterfactual.

    total_bi = sum_k r_bk s_ik <x_b^k, w_i^k>,     shift_bi = sum_k r_bk <x_b^k, d^k> s_ik <w_i^k, d^k>

Eq. 8 is ``total - alpha * shift``. Norms and projections are accumulated from the tiles that the product reads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tde_kernels.backends.grouped import Grouped
from tde_kernels.backends.triton import launch
from tde_kernels.backends.triton.arithmetic import dot, rounded
from tde_kernels.backends.triton.operand import measured_factor, operand, row_constant, row_starts


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a program's tile: in groups of GROUP rows, so that neighbours share operands in the L2."""
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    rows = min(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def effects(
    x,
    w,
    direction,
    alpha,
    update,
    heads,
    width,
    tile_m,
    tile_n,
    tiles_n,
    SHIFT: tl.constexpr,
    INTAKE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``(total, shift)``, both ``[BLOCK_M, BLOCK_N]`` float32, of rows ``tile_m`` and classes ``tile_n``.

    ``SHIFT``: "none" leaves the direction out; "subtracted" returns ``total - alpha * shift`` as total; "apart" returns
    both. Norms and projections of ``x`` are written where ``tile_n`` is 0, those of ``w`` where ``tile_m`` is 0. With
    INTAKE, where ``update`` is an :class:`Update`, so are the masked column sums of its share of the feature blocks.
    """
    row = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.cast(tile_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_exists = row < x.rows
    column_exists = column < w.rows
    within = tl.arange(0, BLOCK_K)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    shift = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if INTAKE:
        counted = row_exists
        if update.mask is not None:
            counted = tl.load(update.mask + row, mask=row_exists, other=0).to(tl.int1)

    block = 0
    for head in range(heads):
        x_start = row_starts(x, row, head, width)
        w_start = row_starts(w, column, head, width)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_squares = tl.zeros((BLOCK_M,), tl.float32)
        w_squares = tl.zeros((BLOCK_N,), tl.float32)
        x_along = tl.zeros((BLOCK_M,), tl.float32)
        w_along = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, width, BLOCK_K):
            channel = (start + within).to(tl.int64)
            inside = channel < width
            x_tile = tl.load(
                x_start + (channel * x.stride_col)[None, :], mask=row_exists[:, None] & inside[None, :], other=0.0
            )
            w_tile = tl.load(
                w_start + (channel * w.stride_col)[None, :], mask=column_exists[:, None] & inside[None, :], other=0.0
            )
            if x.FACTOR != "one":
                x_squares += tl.sum(x_tile.to(tl.float32) * x_tile.to(tl.float32), 1)
            if w.FACTOR != "one":
                w_squares += tl.sum(w_tile.to(tl.float32) * w_tile.to(tl.float32), 1)
            if SHIFT != "none":
                towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)[None, :]
                x_along += tl.sum(x_tile.to(tl.float32) * towards, 1)
                w_along += tl.sum(w_tile.to(tl.float32) * towards, 1)
            product = dot(rounded(x_tile, OPERAND), tl.trans(rounded(w_tile, OPERAND)), product, PRECISION)
            if INTAKE:
                if block % tiles_n == tile_n:  # this program's share of the blocks
                    taken = tl.where(counted[:, None], x_tile.to(tl.float32), 0.0)
                    place = update.partial_sums + (tl.cast(tile_m, tl.int64) * heads + head) * width + channel
                    tl.store(place, tl.sum(taken, 0), mask=inside)
                block += 1

        x_factor = measured_factor(x, x_squares, row, row_exists, head, heads, width, tile_n == 0, BLOCK_K)
        w_factor = measured_factor(w, w_squares, column, column_exists, head, heads, width, tile_m == 0, BLOCK_K)
        x_factor *= row_constant(x, row, row_exists)  # read again for each head: held, it costs registers
        w_factor *= row_constant(w, column, column_exists)
        total += product * x_factor[:, None] * w_factor[None, :]
        if SHIFT != "none":
            x_along *= x_factor
            w_along *= w_factor
            if x.along is not None:
                if tile_n == 0:
                    tl.store(x.along + row * heads + head, x_along, mask=row_exists)
            if w.along is not None:
                if tile_m == 0:
                    tl.store(w.along + column * heads + head, w_along, mask=column_exists)
            if SHIFT == "subtracted":
                total -= (alpha * x_along)[:, None] * w_along[None, :]
            else:
                shift += x_along[:, None] * w_along[None, :]
    return total, shift


def inputs(p: Grouped, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of :func:`effects` that describe the problem; ``dtype`` is that of the tiles multiplied."""
    return {
        "x": operand(p.features),
        "w": operand(p.weights),
        "direction": p.direction,
        "heads": p.heads,
        "width": p.x.shape[1] // p.heads,
        "OPERAND": launch.language_dtype(dtype),
        "PRECISION": launch.precision(),
    }


def exact_dtype(p: Grouped) -> torch.dtype:
    """The dtype of tiles whose product is then compared or subtracted from: the operands' own if they agree."""
    return p.x.dtype if p.x.dtype == p.w.dtype else torch.float32
