"""Gradients of the grouped logits: a product for each operand, and the projection onto the tangent of its norm.

For the operand ``a`` with rows m, the other one ``b`` with rows n, and the upstream gradient ``g_mn``,

    v_m^k = sum_n g_mn b_hat_n^k,      b_hat the other operand, scaled and less its share of the direction,
    da_m^k = the gradient of a_m^k where v_m^k is that of a_hat_m^k.

Where a tile spans a whole head the second line is the product's epilogue; else v is stored in float32 and a pass of
:mod:`rows` follows, for the projection takes a difference that 16 bits would lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends import core
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.arithmetic import dot, rounded
from tde_kernels.backends.triton.effects import collapsed, tile_of
from tde_kernels.backends.triton.norms import factor_kind, norm_factor
from tde_kernels.backends.triton.product import product
from tde_kernels.backends.triton.rows import Rows, row_constant, row_gradient


@triton.jit(do_not_specialize=["bucket"])
def _operand_gradient(
    grad,
    a,
    b,
    out,
    a_norms,
    b_norms,
    a_divisor,
    b_divisor,
    grad_divisor,
    direction,
    alpha,
    along_b,
    rows,
    others,
    heads,
    width,
    grad_stride_row,
    grad_stride_other,
    a_stride_row,
    a_stride_col,
    b_stride_row,
    b_stride_col,
    a_scale,
    b_scale,
    a_offset,
    a_power,
    b_offset,
    b_power,
    bucket,
    A_FACTOR: tl.constexpr,
    B_FACTOR: tl.constexpr,
    DIRECTED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out [rows, D]``: the gradient of ``a``, or v on the way to it.

    ``DIRECTED``: which operand has its share of the direction subtracted: "a", "b" or "neither".
    ``EPILOGUE``: "projected" (a tile spans a head), "scaled" (there is nothing to project) or "none".
    """
    per_head = tl.cdiv(width, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), heads * per_head, 8)
    head = tile_n // per_head
    row = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tile_n % per_head * BLOCK_N + tl.arange(0, BLOCK_N)
    row_exists = row < rows
    inside = channel < width
    column = (head * width + channel).to(tl.int64)
    within = tl.arange(0, BLOCK_K)

    v = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    towards_b = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, others, BLOCK_K):
        other = tl.cast(start, tl.int64) + within
        other_exists = other < others
        upstream = tl.load(
            grad + (row * grad_stride_row)[:, None] + (other * grad_stride_other)[None, :],
            mask=row_exists[:, None] & other_exists[None, :],
            other=0.0,
        )
        factor = tl.full((BLOCK_K,), 1.0, tl.float32) * b_scale
        if b_divisor is not None:
            factor = b_scale / tl.load(b_divisor + other, mask=other_exists, other=1.0)
        if B_FACTOR != "one":
            norm = tl.load(b_norms + other * heads + head, mask=other_exists, other=1.0)
            factor *= norm_factor(norm, b_offset, b_power, B_FACTOR)
        scaled = upstream.to(tl.float32) * factor[None, :]
        b_tile = tl.load(
            b + (other * b_stride_row)[:, None] + (column * b_stride_col)[None, :],
            mask=other_exists[:, None] & inside[None, :],
            other=0.0,
        )
        v = dot(rounded(scaled, OPERAND), rounded(b_tile, OPERAND), v, PRECISION)
        if DIRECTED == "b":  # along_b has the factor in it
            along = tl.load(along_b + other * heads + head, mask=other_exists, other=0.0)
            towards_b += tl.sum(upstream.to(tl.float32) * along[None, :], 1)

    if DIRECTED == "b":
        towards = tl.load(direction + column, mask=inside, other=0.0)
        v -= (tl.load(alpha) * towards_b)[:, None] * towards[None, :]
    valid = row_exists[:, None] & inside[None, :]
    place = out + (row * (heads * width))[:, None] + column[None, :]
    if EPILOGUE == "scaled":
        v *= row_constant(a_scale, a_divisor, row, row_exists)[:, None]
    if EPILOGUE == "projected":
        own = tl.load(a + (row * a_stride_row)[:, None] + (column * a_stride_col)[None, :], mask=valid, other=0.0)
        own = own.to(tl.float32)
        towards_a = tl.zeros((BLOCK_N,), tl.float32)
        strength = 0.0
        if DIRECTED == "a":
            towards_a = tl.load(direction + column, mask=inside, other=0.0)
            strength = tl.load(alpha)
        norm = tl.full((BLOCK_M,), 1.0, tl.float32)
        if A_FACTOR != "one":
            norm = tl.load(a_norms + row * heads + head, mask=row_exists, other=1.0)
        v, a_hat_v = row_gradient(
            v,
            own,
            towards_a,
            tl.sum(v * own, 1),
            tl.sum(v * towards_a[None, :], 1),
            tl.sum(own * towards_a[None, :], 1),
            strength,
            norm,
            row_constant(a_scale, a_divisor, row, row_exists),
            a_offset,
            a_power,
            A_FACTOR,
            DIRECTED == "a",
        )
        if grad_divisor is not None:
            divisor = tl.load(a_divisor + row, mask=row_exists, other=1.0)
            tl.store(grad_divisor + row * heads + head, -a_hat_v / divisor, mask=row_exists)
    tl.store(place, rounded(v, out.dtype.element_ty), mask=valid)


def _gradient(
    grad: Tensor,
    own: Rows,
    other: Rows,
    own_norms: Tensor | None,
    other_norms: Tensor | None,
    along_other: Tensor | None,
    grad_divisor: Tensor | None,
) -> Tensor:
    """The gradient ``[R, D]`` of ``own.a`` for ``grad [R, N]``; into ``grad_divisor [R, K]`` its divisor's, by head."""
    rows, others = grad.shape
    heads, dim = own.num_heads, own.a.shape[1]
    width = dim // heads
    choices = configs.tiles(rows, width, others, (own.a, other.a), columns=heads)
    whole = [c for c in choices if c["BLOCK_N"] >= width]
    if not own.factor[1] and own.alpha is None and grad_divisor is None:
        epilogue = "scaled"
    elif whole:
        epilogue, choices = "projected", whole
    else:
        epilogue = "none"
    out = own.a.new_empty((rows, dim), dtype=torch.float32 if epilogue == "none" else own.a.dtype)
    directed = "a" if own.alpha is not None else "b" if other.alpha is not None else "neither"
    direction = own if directed == "a" else other
    arguments = {
        "grad": grad,
        "a": own.a,
        "b": other.a,
        "out": out,
        "a_norms": own_norms,
        "b_norms": other_norms,
        "a_divisor": own.divisor,
        "b_divisor": other.divisor,
        "grad_divisor": grad_divisor if epilogue == "projected" else None,
        "direction": direction.direction,
        "alpha": direction.alpha,
        "along_b": along_other,
        "rows": rows,
        "others": others,
        "heads": heads,
        "width": width,
        "grad_stride_row": grad.stride(0),
        "grad_stride_other": grad.stride(1),
        "a_stride_row": own.a.stride(0),
        "a_stride_col": own.a.stride(1),
        "b_stride_row": other.a.stride(0),
        "b_stride_col": other.a.stride(1),
        "a_scale": own.scale,
        "b_scale": other.scale,
        "a_offset": own.factor[0],
        "a_power": own.factor[1],
        "b_offset": other.factor[0],
        "b_power": other.factor[1],
        "bucket": launch.bucket(rows, others, heads, width),
        "A_FACTOR": factor_kind(own.factor[1]),
        "B_FACTOR": factor_kind(other.factor[1]),
        "DIRECTED": directed,
        "EPILOGUE": epilogue,
        **_multiplied_as(grad.dtype),
    }

    def programs(chosen: dict[str, Any]) -> int:
        tiles: int = triton.cdiv(rows, chosen["BLOCK_M"]) * heads * triton.cdiv(width, chosen["BLOCK_N"])
        return tiles

    launch.run_tuned(_operand_gradient, programs, grad.device, arguments, choices[0], choices[1:])
    return own.backward(out, own_norms, grad_divisor) if epilogue == "none" else out


def _around_library(
    grad: Tensor, own: Rows, other: Rows, own_norms: Tensor | None, grad_divisor: Tensor | None
) -> Tensor:
    """The same by a library's product of the other operand, scaled beforehand."""
    scaled = other.a if other.plain and other.a.dtype == grad.dtype else other.normalize(grad.dtype, None, None)
    v = product(grad, scaled.t(), torch.float32)
    return own.backward(v, own_norms, grad_divisor)


def _multiplied_as(dtype: torch.dtype) -> dict[str, Any]:
    """Gradients times scales leave float16's range: its tiles are multiplied as tf32, of the same mantissa."""
    if dtype == torch.float16:
        return {"OPERAND": tl.float32, "PRECISION": "tf32"}
    return {"OPERAND": launch.language_dtype(dtype), "PRECISION": launch.precision()}


def _given(a: Tensor) -> Tensor | None:
    return a if a.dim() == 2 else None


def logits_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    x_hat: Tensor,
    w_hat: Tensor,
    x_norms: Tensor,
    w_norms: Tensor,
    along_x: Tensor,
    class_scale: Tensor | None,
    direction: Tensor | None,
    alpha: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    feature_factor: Sequence[float],
    weight_factor: Sequence[float],
    wants_x: bool,
    wants_w: bool,
    wants_class_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::logits_backward``."""
    heads = collapsed(num_heads, feature_factor, weight_factor, direction is not None)
    features = Rows(x, heads, feature_factor, direction=core.float_vector(direction), alpha=alpha)
    weights = Rows(w, heads, weight_factor, scale=scale, divisor=core.float_vector(class_scale))
    nothing = x.new_empty(0, dtype=torch.float32)
    dx, dw, dscale = nothing, nothing.clone(), nothing.clone()
    if wants_x:
        dx = _operand(grad, features, weights, _given(x_norms), _given(w_norms), None, None)
    if wants_w or wants_class_scale:
        shares = x.new_empty((w.shape[0], heads), dtype=torch.float32) if wants_class_scale else None
        dw = _operand(grad.t(), weights, features, _given(w_norms), _given(x_norms), _given(along_x), shares)
        if shares is not None:
            dscale = shares.sum(1)
    return dx, dw, dscale


def _operand(
    grad: Tensor,
    own: Rows,
    other: Rows,
    own_norms: Tensor | None,
    other_norms: Tensor | None,
    along_other: Tensor | None,
    grad_divisor: Tensor | None,
) -> Tensor:
    """The gradient of ``own.a`` by the plan for its shape."""
    if grad.shape[1] == 0:  # no rows to learn from, and no norms of a forward that never ran
        if grad_divisor is not None:
            grad_divisor.zero_()
        return torch.zeros_like(own.a, memory_format=torch.contiguous_format)
    if configs.around_library("backward", grad.shape[0], own.a.shape[1] // own.num_heads, grad.shape[1], grad.dtype):
        return _around_library(grad, own, other, own_norms, grad_divisor)
    return _gradient(grad, own, other, own_norms, other_norms, along_other, grad_divisor)
