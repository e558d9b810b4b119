"""Grouped normalised logits, less their counterfactual where there is a direction, and the EMA: one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.core import Saved
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.arithmetic import rounded
from tde_kernels.backends.triton.effects import effects, operands, tile_of
from tde_kernels.backends.triton.ema import feature_sum, fold_partials, sum_arguments, update_ema_
from tde_kernels.backends.triton.product import product
from tde_kernels.backends.triton.rows import Rows


@triton.jit(do_not_specialize=["bucket"])
def _grouped_logits(
    x,
    w,
    class_scale,
    direction,
    alpha,
    mask,
    logits,
    x_norms,
    w_norms,
    along_x,
    along_w,
    ema,
    num_updates,
    sums,
    partial_sums,
    counts,
    arrivals,
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
    momentum,
    bucket,
    SHIFT: tl.constexpr,
    X_FACTOR: tl.constexpr,
    W_FACTOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(batch, BLOCK_M)
    tiles_n = tl.cdiv(classes, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, 8)
    strength = 0.0
    if SHIFT == "subtracted":
        strength = tl.load(alpha)
    total, _ = effects(
        x,
        w,
        class_scale,
        direction,
        strength,
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
        X_FACTOR,
        W_FACTOR,
        SHIFT,
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

    if partial_sums is not None:
        if tile_n < heads * tl.cdiv(width, BLOCK_K):  # else this column of tiles had no share
            counted = row < batch
            if mask is not None:
                counted = tl.load(mask + row, mask=counted, other=0).to(tl.int1)
            tl.store(counts + tl.cast(tile_n, tl.int64) * tiles_m + tile_m, tl.sum(counted.to(tl.float32), 0))
            fold_partials(
                ema,
                num_updates,
                sums,
                partial_sums,
                counts,
                arrivals,
                heads,
                width,
                momentum,
                tiles_m,
                tile_n,
                tiles_n,
                BLOCK_K,
                16,
            )


def _single_pass(
    inputs: dict[str, Any],
    dtype: torch.dtype,
    shift: str,
    *,
    update: dict[str, Any],
    **pointers: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Logits ``[B, C]`` in ``dtype``, and the feature sum if ``update`` (of :func:`sum_arguments`) asks for one."""
    x, batch, classes, width = inputs["x"], inputs["batch"], inputs["classes"], inputs["width"]
    choices = configs.tiles(batch, classes, width, (x, inputs["w"]))

    def tiles(chosen: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(batch, chosen["BLOCK_M"]), triton.cdiv(classes, chosen["BLOCK_N"])

    blocks, shares = (max(sizes) for sizes in zip(*map(tiles, choices), strict=True))
    sum_inputs = sum_arguments(x, **update, blocks=blocks, shares=shares)
    logits = x.new_empty((batch, classes), dtype=dtype)
    arguments = {
        **inputs,
        **sum_inputs,
        **pointers,
        "logits": logits,
        "bucket": launch.bucket(batch, classes, inputs["heads"], width),
        "SHIFT": shift,
    }
    launch.run_tuned(
        _grouped_logits,
        lambda chosen: math.prod(tiles(chosen)),
        x.device,
        arguments,
        choices[0],
        choices[1:],
        restored=tuple(name for name in ("ema", "num_updates") if sum_inputs[name] is not None),
    )
    return logits, sum_inputs["sums"]


def saves(
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
) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`: norms and projections, never a copy of an operand."""

    def per_head(a: Tensor, wanted: bool) -> Saved:
        return Saved((a.shape[0], num_heads) if wanted else (0,))

    norms = per_head(x, feature_factor[1] != 0), per_head(w, weight_factor[1] != 0)
    return [Saved((0,)), Saved((0,)), *norms, per_head(x, direction is not None)]


def logits(
    x: Tensor,
    w: Tensor,
    class_scale: Tensor | None,
    direction: Tensor | None,
    alpha: Tensor | None,
    mask: Tensor | None,
    ema: Tensor | None,
    num_updates: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    feature_factor: Sequence[float],
    weight_factor: Sequence[float],
    momentum: float,
    take_sum: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """See ``tde::logits``."""
    inputs = operands(
        x,
        w,
        class_scale,
        direction,
        num_heads=num_heads,
        scale=scale,
        feature_factor=feature_factor,
        weight_factor=weight_factor,
        dtype=dtype,
    )
    batch, classes, heads = x.shape[0], w.shape[0], inputs["heads"]
    slots = saves(
        x,
        w,
        class_scale,
        direction,
        num_heads=num_heads,
        scale=scale,
        feature_factor=feature_factor,
        weight_factor=weight_factor,
        dtype=dtype,
    )
    saved = [x.new_empty(shape, dtype=kind) for shape, kind in slots]
    _, _, x_norms, w_norms, along_x = (s if s.dim() == 2 else None for s in saved)
    nothing = x.new_empty(0, dtype=torch.float32)
    if configs.around_library("forward", batch, classes, x.shape[1], dtype):
        features = Rows(x, heads, feature_factor, direction=inputs["direction"], alpha=alpha)
        weights = Rows(w, heads, weight_factor, scale=scale, divisor=inputs["class_scale"])
        x_hat, w_hat = features.normalize(dtype, x_norms, along_x), weights.normalize(dtype, w_norms, None)
        if ema is not None:
            update_ema_(ema, num_updates, x, mask, momentum=momentum)
        return product(x_hat, w_hat, dtype), *saved, feature_sum(x, mask) if take_sum else nothing
    z, sums = _single_pass(
        inputs,
        dtype,
        "none" if direction is None else "subtracted",
        update={"ema": ema, "num_updates": num_updates, "momentum": momentum, "take_sum": take_sum},
        alpha=alpha,
        mask=mask,
        x_norms=x_norms,
        w_norms=w_norms,
        along_x=along_x,
        along_w=None,
    )
    core.mark_written(ema, num_updates)
    return z, *saved, nothing if sums is None else sums


def total_effects(
    x: Tensor, w: Tensor, class_scale: Tensor | None, direction: Tensor, **family: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tde_kernels.reference.effects`: Eq. 7 ``[B, C]``, projections ``[B, K]`` and ``[C, K]``, in float32."""
    dtype = x.dtype if x.dtype == w.dtype else torch.float32
    inputs = operands(x, w, class_scale, direction, dtype=dtype, **family)
    batch, classes, heads = inputs["batch"], inputs["classes"], inputs["heads"]
    along_x, along_w = (x.new_empty((rows, heads), dtype=torch.float32) for rows in (batch, classes))
    if configs.around_library("forward", batch, classes, x.shape[1], dtype):
        features = Rows(x, heads, family["feature_factor"], direction=inputs["direction"])
        weights = Rows(
            w,
            heads,
            family["weight_factor"],
            scale=family["scale"],
            divisor=inputs["class_scale"],
            direction=inputs["direction"],
        )
        x_hat = features.normalize(torch.float32, None, along_x)
        return product(x_hat, weights.normalize(torch.float32, None, along_w), torch.float32), along_x, along_w
    total, _ = _single_pass(
        inputs,
        torch.float32,
        "apart",
        update={"ema": None, "num_updates": None, "momentum": 0.0, "take_sum": False},
        alpha=None,
        mask=None,
        x_norms=None,
        w_norms=None,
        along_x=along_x,
        along_w=along_w,
    )
    return total, along_x, along_w
