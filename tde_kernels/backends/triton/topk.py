"""The largest logits and their classes: each program keeps a short list while it goes through its share of the classes.

The lists of all shares, ``k`` long each, are sorted at the end; no logit is stored but those on a list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels import reference
from tde_kernels.backends import largest
from tde_kernels.backends.grouped import Grouped
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.effects import effects, inputs
from tde_kernels.backends.triton.logits import logits
from tde_kernels.backends.triton.rows import PASSES

# A list is searched element by element: beyond this length a product of some classes at a time is the better way
_LONGEST = 32
_EMPTY = tl.constexpr(-(2**31))  # as a key: below that of every logit
_HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def _keys(score):
    """float32 numbers as int32 in the same order, NaN, which comparisons would pass over, above all, as for torch."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # one zero
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), _HIGHEST)


@triton.jit
def _values(keys):
    """The numbers of :func:`_keys`; minus infinity of what is empty."""
    values = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(keys == _EMPTY, float("-inf"), values)


@triton.jit
def _keep_largest(
    x,
    w,
    direction,
    alpha,
    values,
    indices,
    heads,
    width,
    k,
    splits,
    SHIFT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch, classes = x.rows, w.rows
    tiles_n = tl.cdiv(classes, BLOCK_N)
    tile_m = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    strength = 0.0
    if SHIFT == "subtracted":
        strength = tl.load(alpha)
    slot = tl.arange(0, LENGTH)
    # slots beyond k are never the smallest, so nothing is put in them; empty ones rank behind every class
    kept = tl.where(slot < k, _EMPTY, _HIGHEST)[None, :] + tl.zeros((BLOCK_M, LENGTH), tl.int32)
    kept_class = (classes + slot)[None, :] + tl.zeros((BLOCK_M, LENGTH), tl.int32)
    for tile_n in range(split, tiles_n, splits):
        score, _ = effects(
            x,
            w,
            direction,
            strength,
            None,
            heads,
            width,
            tile_m,
            tile_n,
            tiles_n,
            SHIFT,
            False,
            OPERAND,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = tl.where((column < classes)[None, :], _keys(score), _EMPTY)
        for _ in range(k):
            largest = tl.max(keys, 1)
            winner = tl.min(tl.where(keys == largest[:, None], column[None, :], tiles_n * BLOCK_N), 1)
            keys = tl.where(column[None, :] == winner[:, None], _EMPTY, keys)
            # the list's last: its smallest key, and of equal ones the highest class
            smallest = tl.min(kept, 1)
            last = tl.max(tl.where(kept == smallest[:, None], kept_class, -1), 1)
            replaced = (largest > smallest)[:, None] & (kept_class == last[:, None])
            kept = tl.where(replaced, largest[:, None], kept)
            kept_class = tl.where(replaced, winner[:, None], kept_class)
    place = (row[:, None] * splits + split) * k + slot[None, :]
    valid = (row < batch)[:, None] & (slot < k)[None, :]
    tl.store(values + place, _values(kept), mask=valid)
    tl.store(indices + place, kept_class.to(tl.int64), mask=valid)


def topk(p: Grouped, *, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See ``tde::topk``."""
    if k > _LONGEST:
        return largest.topk(PASSES, logits, p, k=k, dtype=dtype)
    x, batch, classes = p.x, p.x.shape[0], p.w.shape[0]
    config = configs.tiles_kept(batch, classes, x.shape[1] // p.heads, (x, p.w))
    tiles_m = triton.cdiv(batch, config["BLOCK_M"])
    splits = configs.splits(tiles_m, triton.cdiv(classes, config["BLOCK_N"]))
    values = x.new_empty((batch, splits * k), dtype=torch.float32)
    indices = x.new_empty((batch, splits * k), dtype=torch.int64)
    arguments = {
        **inputs(p, dtype),
        "alpha": p.alpha,
        "SHIFT": "none" if p.direction is None else "subtracted",
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
