"""The largest logits and their classes: each program keeps a short list while it goes through its share of the classes.

The lists of all shares, ``k`` long each, are sorted at the end; no logit is stored but those on a list.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels import reference
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.effects import effects, operands
from tde_kernels.backends.triton.logits import logits

# A list is searched element by element: beyond this length a sort of stored logits is the better way
_LONGEST = 32


@triton.jit
def _keep_largest(
    x,
    w,
    class_scale,
    direction,
    alpha,
    values,
    indices,
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
    k,
    splits,
    X_FACTOR: tl.constexpr,
    W_FACTOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(classes, BLOCK_N)
    tile_m = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    strength = 0.0
    if direction is not None:
        strength = tl.load(alpha)
    slot = tl.arange(0, LENGTH)
    # slots beyond k are never the smallest, so nothing is put in them; empty ones rank behind every class
    kept = tl.where(slot < k, float("-inf"), float("inf"))[None, :] + tl.zeros((BLOCK_M, LENGTH), tl.float32)
    kept_class = (classes + slot)[None, :] + tl.zeros((BLOCK_M, LENGTH), tl.int32)
    for tile_n in range(split, tiles_n, splits):
        score, _ = effects(
            x,
            w,
            class_scale,
            direction,
            strength,
            None,
            None,
            None,
            None,
            None,
            None,
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
            X_FACTOR,
            W_FACTOR,
            "none" if direction is None else "subtracted",
            OPERAND,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        score = tl.where((column < classes)[None, :], score, float("-inf"))
        for _ in range(k):
            value = tl.max(score, 1)
            winner = tl.min(tl.where(score == value[:, None], column[None, :], tiles_n * BLOCK_N), 1)
            score = tl.where(column[None, :] == winner[:, None], float("-inf"), score)
            # the list's last: its smallest value, and of equal ones the highest class
            smallest = tl.min(kept, 1)
            last = tl.max(tl.where(kept == smallest[:, None], kept_class, -1), 1)
            enters = (value > smallest) & (winner < classes)
            replaced = enters[:, None] & (kept_class == last[:, None])
            kept = tl.where(replaced, value[:, None], kept)
            kept_class = tl.where(replaced, winner[:, None], kept_class)
    place = (row[:, None] * splits + split) * k + slot[None, :]
    valid = (row < batch)[:, None] & (slot < k)[None, :]
    tl.store(values + place, kept, mask=valid)
    tl.store(indices + place, kept_class.to(tl.int64), mask=valid)


def topk(
    x: Tensor,
    w: Tensor,
    class_scale: Tensor | None,
    direction: Tensor | None,
    alpha: Tensor | None,
    *,
    k: int,
    dtype: torch.dtype,
    **family: Any,
) -> tuple[Tensor, Tensor]:
    """See ``tde::topk``."""
    if k > _LONGEST:
        stored, *_ = logits(
            x, w, class_scale, direction, alpha, None, None, None, momentum=0.0, take_sum=False, dtype=dtype, **family
        )
        return reference.lowest_topk(stored, k)
    batch, classes = x.shape[0], w.shape[0]
    inputs = operands(x, w, class_scale, direction, dtype=dtype, **family)
    config = configs.tiles_kept(batch, classes, inputs["width"], (x, w))
    tiles_m = triton.cdiv(batch, config["BLOCK_M"])
    splits = configs.splits(tiles_m, triton.cdiv(classes, config["BLOCK_N"]))
    values = x.new_empty((batch, splits * k), dtype=torch.float32)
    indices = x.new_empty((batch, splits * k), dtype=torch.int64)
    arguments = {
        **inputs,
        "alpha": alpha,
        "values": values,
        "indices": indices,
        "k": k,
        "splits": splits,
        "LENGTH": triton.next_power_of_2(k),
    }
    launch.run(_keep_largest, tiles_m * splits, x.device, arguments, config)
    indices, order = torch.sort(indices, dim=1)  # so that the stable sort below leaves ties to the lowest class
    best, place = reference.lowest_topk(values.gather(1, order), k)
    return best.to(dtype), indices.gather(1, place)
