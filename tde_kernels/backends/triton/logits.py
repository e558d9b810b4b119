"""Grouped normalised logits, less their counterfactual where there is a direction, and the EMA: one launch."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends import around_product, core
from tde_kernels.backends.core import Kept, Saved
from tde_kernels.backends.grouped import Grouped, Intake
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.arithmetic import rounded
from tde_kernels.backends.triton.effects import effects, exact_dtype, inputs, tile_of
from tde_kernels.backends.triton.ema import fold_partials, take_in, update_of
from tde_kernels.backends.triton.rows import PASSES


@triton.jit(do_not_specialize=["bucket"])
def _grouped_logits(
    x,
    w,
    direction,
    alpha,
    logits,
    update,
    ema,
    num_updates,
    heads,
    width,
    bucket,
    SHIFT: tl.constexpr,
    INTAKE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch, classes = x.rows, w.rows
    tiles_m = tl.cdiv(batch, BLOCK_M)
    tiles_n = tl.cdiv(classes, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, 8)
    strength = 0.0
    if SHIFT == "subtracted":
        strength = tl.load(alpha)
    total, _ = effects(
        x,
        w,
        direction,
        strength,
        update,
        heads,
        width,
        tile_m,
        tile_n,
        tiles_n,
        SHIFT,
        INTAKE,
        OPERAND,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    row = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.cast(tile_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < batch)[:, None] & (column < classes)[None, :]
    tl.store(logits + (row * classes)[:, None] + column[None, :], rounded(total, logits.dtype.element_ty), mask=inside)

    if INTAKE:
        if tile_n < heads * tl.cdiv(width, BLOCK_K):  # else this column of tiles had no share
            counted = row < batch
            if update.mask is not None:
                counted = tl.load(update.mask + row, mask=counted, other=0).to(tl.int1)
            place = update.counts + tl.cast(tile_n, tl.int64) * tiles_m + tile_m
            tl.store(place, tl.sum(counted.to(tl.float32), 0))
            fold_partials(update, ema, num_updates, heads, width, tiles_m, tile_n, tiles_n, BLOCK_K, 16)


def _single_pass(
    p: Grouped,
    multiplied: torch.dtype,
    dtype: torch.dtype,
    shift: str,
    saved: tuple[Tensor | None, ...],
    intake: Intake,
) -> tuple[Tensor, Tensor | None]:
    """Logits ``[B, C]`` in ``dtype``, and the feature sum if it is to be taken.

    Args:
        multiplied: the dtype of the tiles that are multiplied.
        saved: what is written besides: norms of features and weights, their projections on the direction.
    """
    (batch, dim), classes = p.x.shape, p.w.shape[0]
    choices = configs.tiles(batch, classes, dim // p.heads, (p.x, p.w))

    def tiles(chosen: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(batch, chosen["BLOCK_M"]), triton.cdiv(classes, chosen["BLOCK_N"])

    blocks, shares = (max(sizes) for sizes in zip(*map(tiles, choices), strict=True))
    update = update_of(p.x, intake, blocks=blocks, shares=shares)
    logits = p.x.new_empty((batch, classes), dtype=dtype)
    arguments = inputs(p, multiplied)
    x_norms, w_norms, along_x, along_w = saved
    arguments |= {
        "x": arguments["x"]._replace(norms=x_norms, along=along_x),
        "w": arguments["w"]._replace(norms=w_norms, along=along_w),
        "alpha": p.alpha,
        "logits": logits,
        "update": update,
        "ema": intake.ema,
        "num_updates": intake.num_updates,
        "bucket": launch.bucket(batch, classes, p.heads, arguments["width"]),
        "SHIFT": shift,
        "INTAKE": update is not None,  # Triton 3.6 cannot ask it of a tuple
    }
    launch.run_tuned(
        _grouped_logits,
        lambda chosen: math.prod(tiles(chosen)),
        p.x.device,
        arguments,
        choices[0],
        choices[1:],
        restored=tuple(name for name in ("ema", "num_updates") if arguments[name] is not None),
    )
    return logits, None if update is None else update.sums


def saves(p: Grouped, dtype: torch.dtype) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`: norms and projections, never a copy of an operand."""

    def per_head(a: Tensor, wanted: bool) -> Saved:
        return Saved((a.shape[0], p.heads) if wanted else (0,))

    norms = per_head(p.x, p.feature_factor.power != 0), per_head(p.w, p.weight_factor.power != 0)
    return [Saved((0,)), Saved((0,)), *norms, per_head(p.x, p.direction is not None)]


def logits(p: Grouped, intake: Intake, dtype: torch.dtype) -> tuple[Tensor, Kept, Tensor | None]:
    """See ``tde::logits``."""
    (batch, dim), classes = p.x.shape, p.w.shape[0]
    kept = core.allocated(p.x, saves(p, dtype))
    x_norms, w_norms, along_x = kept[2:]
    if configs.around_library("forward", batch, classes, dim, dtype):
        x_hat = PASSES.normalize(p.features, dtype, norms=x_norms, along=along_x)
        w_hat = PASSES.normalize(p.weights, dtype, norms=w_norms)
        z, sums = PASSES.product(x_hat, w_hat), take_in(p.x, intake)
    else:
        shift = "none" if p.direction is None else "subtracted"
        core.mark_written(intake.ema, intake.num_updates)
        z, sums = _single_pass(p, dtype, dtype, shift, (x_norms, w_norms, along_x, None), intake)
    return z, kept, sums


def total_effects(p: Grouped) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tde_kernels.reference.effects`: Eq. 7 ``[B, C]``, projections ``[B, K]`` and ``[C, K]``, in float32."""
    (batch, dim), classes, dtype = p.x.shape, p.w.shape[0], exact_dtype(p)
    if configs.around_library("forward", batch, classes, dim, dtype):
        return around_product.effects(PASSES, p)
    along_x, along_w = (p.x.new_empty((rows, p.heads), dtype=torch.float32) for rows in (batch, classes))
    total, _ = _single_pass(p, dtype, torch.float32, "apart", (None, None, along_x, along_w), Intake())
    return total, along_x, along_w
