"""The device function that every forward kernel shares: one tile of Eq. 7 and of its counterfactual.

    total_bi = sum_k r_bk s_ik <x_b^k, w_i^k>,     shift_bi = sum_k r_bk <x_b^k, d^k> s_ik <w_i^k, d^k>

Eq. 8 is ``total - alpha * shift``. Norms and projections are accumulated from the tiles that the product reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.triton import launch
from tde_kernels.backends.triton.arithmetic import dot, rounded
from tde_kernels.backends.triton.norms import exact_norm, factor_kind, norm_factor


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
    class_scale,
    direction,
    alpha,
    x_norms,
    w_norms,
    along_x,
    along_w,
    mask,
    partial_sums,
    batch,
    classes,
    heads,
    width,
    x_stride_row,
    x_stride_col,
    w_stride_row,
    w_stride_col,
    scale,
    x_offset,
    x_power,
    w_offset,
    w_power,
    tile_m,
    tile_n,
    tiles_n,
    X_FACTOR: tl.constexpr,
    W_FACTOR: tl.constexpr,
    SHIFT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``(total, shift)``, both ``[BLOCK_M, BLOCK_N]`` float32, of rows ``tile_m`` and classes ``tile_n``.

    Pointers that are None are neither read nor written. With ``SHIFT``: "none" leaves the direction out;
    "subtracted" returns ``total - alpha * shift`` as total; "apart" returns both. Where ``tile_n`` is 0 it writes
    ``x_norms`` and ``along_x [B, K]`` of its rows, where ``tile_m`` is 0 ``w_norms`` and ``along_w [C, K]``. With
    ``partial_sums [tiles_m, D]`` it also writes the masked column sums of its share of the feature blocks.
    """
    row = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.cast(tile_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_exists = row < batch
    column_exists = column < classes
    x_row = x + (row * x_stride_row)[:, None]
    w_row = w + (column * w_stride_row)[:, None]
    within = tl.arange(0, BLOCK_K)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    shift = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if partial_sums is not None:
        counted = row_exists
        if mask is not None:
            counted = tl.load(mask + row, mask=row_exists, other=0).to(tl.int1)
    class_factor = tl.full((BLOCK_N,), 1.0, tl.float32) * scale
    if class_scale is not None:
        class_factor = scale / tl.load(class_scale + column, mask=column_exists, other=1.0)

    block = 0
    for head in range(heads):
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_squares = tl.zeros((BLOCK_M,), tl.float32)
        w_squares = tl.zeros((BLOCK_N,), tl.float32)
        x_along = tl.zeros((BLOCK_M,), tl.float32)
        w_along = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, width, BLOCK_K):
            inside = start + within < width
            channel = (head * width + start + within).to(tl.int64)
            x_tile = tl.load(
                x_row + (channel * x_stride_col)[None, :], mask=row_exists[:, None] & inside[None, :], other=0.0
            )
            w_tile = tl.load(
                w_row + (channel * w_stride_col)[None, :], mask=column_exists[:, None] & inside[None, :], other=0.0
            )
            product = dot(rounded(x_tile, OPERAND), tl.trans(rounded(w_tile, OPERAND)), product, PRECISION)
            if X_FACTOR != "one":
                x_squares += tl.sum(x_tile.to(tl.float32) * x_tile.to(tl.float32), 1)
            if W_FACTOR != "one":
                w_squares += tl.sum(w_tile.to(tl.float32) * w_tile.to(tl.float32), 1)
            if SHIFT != "none":
                towards = tl.load(direction + channel, mask=inside, other=0.0)[None, :]
                x_along += tl.sum(x_tile.to(tl.float32) * towards, 1)
                w_along += tl.sum(w_tile.to(tl.float32) * towards, 1)
            if partial_sums is not None:
                if block % tiles_n == tile_n:  # this program's share of the blocks
                    taken = tl.where(counted[:, None], x_tile.to(tl.float32), 0.0)
                    place = partial_sums + tl.cast(tile_m, tl.int64) * (heads * width) + channel
                    tl.store(place, tl.sum(taken, 0), mask=inside)
                block += 1

        if X_FACTOR != "one":
            first = x_row + tl.cast(head, tl.int64) * width * x_stride_col
            x_norm = exact_norm(x_squares, first, x_stride_col, width, row_exists, BLOCK_K)
            if x_norms is not None:
                if tile_n == 0:
                    tl.store(x_norms + row * heads + head, x_norm, mask=row_exists)
            x_factor = norm_factor(x_norm, x_offset, x_power, X_FACTOR)
        else:
            x_factor = tl.full((BLOCK_M,), 1.0, tl.float32)
        w_factor = class_factor
        if W_FACTOR != "one":
            first = w_row + tl.cast(head, tl.int64) * width * w_stride_col
            w_norm = exact_norm(w_squares, first, w_stride_col, width, column_exists, BLOCK_K)
            if w_norms is not None:
                if tile_m == 0:
                    tl.store(w_norms + column * heads + head, w_norm, mask=column_exists)
            w_factor *= norm_factor(w_norm, w_offset, w_power, W_FACTOR)

        total += product * x_factor[:, None] * w_factor[None, :]
        if SHIFT != "none":
            x_along *= x_factor
            w_along *= w_factor
            if along_x is not None:
                if tile_n == 0:
                    tl.store(along_x + row * heads + head, x_along, mask=row_exists)
            if along_w is not None:
                if tile_m == 0:
                    tl.store(along_w + column * heads + head, w_along, mask=column_exists)
            if SHIFT == "subtracted":
                total -= (alpha * x_along)[:, None] * w_along[None, :]
            else:
                shift += x_along[:, None] * w_along[None, :]
    return total, shift


def collapsed(num_heads: int, feature_factor: Sequence[float], weight_factor: Sequence[float], directed: bool) -> int:
    """The number of heads that matter: without factors and direction all channels are one head."""
    return num_heads if directed or feature_factor[1] or weight_factor[1] else 1


def operands(
    x: Tensor,
    w: Tensor,
    class_scale: Tensor | None,
    direction: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    feature_factor: Sequence[float],
    weight_factor: Sequence[float],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The arguments of :func:`effects` that describe its inputs; ``dtype`` is that of the tiles multiplied."""
    heads = collapsed(num_heads, feature_factor, weight_factor, direction is not None)
    return {
        "x": x,
        "w": w,
        "class_scale": core.float_vector(class_scale),
        "direction": core.float_vector(direction),
        "batch": x.shape[0],
        "classes": w.shape[0],
        "heads": heads,
        "width": x.shape[1] // heads,
        "x_stride_row": x.stride(0),
        "x_stride_col": x.stride(1),
        "w_stride_row": w.stride(0),
        "w_stride_col": w.stride(1),
        "scale": scale,
        "x_offset": feature_factor[0],
        "x_power": feature_factor[1],
        "w_offset": weight_factor[0],
        "w_power": weight_factor[1],
        "X_FACTOR": factor_kind(feature_factor[1]),
        "W_FACTOR": factor_kind(weight_factor[1]),
        "OPERAND": launch.language_dtype(dtype),
        "PRECISION": launch.precision(),
    }
