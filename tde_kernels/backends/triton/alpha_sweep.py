"""The predicted class for every alpha, from one product: each tile of logits is compared under all alphas.

The classes are split among programs; each keeps its winners in memory, and a second, small launch compares those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends.grouped import Grouped
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.effects import effects, exact_dtype, inputs

_COMPARE = {"BLOCK": 256, "num_warps": 4, "num_stages": 2}


@triton.jit
def _sweep(
    x,
    w,
    direction,
    alphas,
    best,
    best_class,
    heads,
    width,
    steps,
    splits,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch, classes = x.rows, w.rows
    tiles_n = tl.cdiv(classes, BLOCK_N)
    tile_m = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = row < batch
    for tile_n in range(split, tiles_n, splits):
        total, shift = effects(
            x,
            w,
            direction,
            0.0,
            None,
            heads,
            width,
            tile_m,
            tile_n,
            tiles_n,
            "apart",
            False,
            OPERAND,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        for step in range(steps):
            score = tl.where((column < classes)[None, :], total - tl.load(alphas + step) * shift, float("-inf"))
            value = tl.max(score, 1)
            winner = tl.min(tl.where(score == value[:, None], column[None, :], classes - 1), 1)
            place = (tl.cast(split, tl.int64) * steps + step) * batch + row
            if tile_n != split:  # the split's earlier tiles hold lower classes: a tie leaves theirs
                before = tl.load(best + place, mask=row_exists, other=0.0)
                class_before = tl.load(best_class + place, mask=row_exists, other=0)
                winner = tl.where(value > before, winner, class_before)
                value = tl.maximum(value, before)
            tl.store(best + place, value, mask=row_exists)
            tl.store(best_class + place, winner, mask=row_exists)


@triton.jit
def _compare(best, best_class, out, size, splits, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(best + place, mask=inside, other=0.0)
    winner = tl.load(best_class + place, mask=inside, other=0)
    for split in range(1, splits):
        offset = tl.cast(split, tl.int64) * size
        other = tl.load(best + offset + place, mask=inside, other=0.0)
        other_class = tl.load(best_class + offset + place, mask=inside, other=0)
        ahead = (other > value) | ((other == value) & (other_class < winner))
        value = tl.where(ahead, other, value)
        winner = tl.where(ahead, other_class, winner)
    tl.store(out + place, winner.to(tl.int64), mask=inside)


def alpha_sweep(p: Grouped, alphas: Tensor) -> Tensor:
    """See ``tde::alpha_sweep``."""
    x, batch, classes, steps = p.x, p.x.shape[0], p.w.shape[0], alphas.shape[0]
    config = configs.tiles_kept(batch, classes, x.shape[1] // p.heads, (x, p.w))
    tiles_m = triton.cdiv(batch, config["BLOCK_M"])
    splits = configs.splits(tiles_m, triton.cdiv(classes, config["BLOCK_N"]))
    best = x.new_empty((splits, steps, batch), dtype=torch.float32)
    best_class = x.new_empty((splits, steps, batch), dtype=torch.int32)
    out = x.new_empty((steps, batch), dtype=torch.int64)
    if out.numel() == 0:
        return out
    arguments = {
        **inputs(p, exact_dtype(p)),
        "alphas": alphas.to(torch.float32),
        "best": best,
        "best_class": best_class,
        "steps": steps,
        "splits": splits,
    }
    launch.run(_sweep, tiles_m * splits, x.device, arguments, config)
    compared = {"best": best, "best_class": best_class, "out": out, "size": steps * batch, "splits": splits}
    launch.run(_compare, triton.cdiv(steps * batch, _COMPARE["BLOCK"]), x.device, compared, _COMPARE)
    return out
