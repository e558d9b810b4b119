"""Gradients of the grouped logits: a product for each operand, and the projection onto the tangent of its norm.

For the operand ``a`` with rows m, the other one ``b`` with rows n, and the upstream gradient ``g_mn``,

    v_m^k = sum_n g_mn b_hat_n^k,      b_hat the other operand, scaled and less its share of the direction,
    da_m^k = the gradient of a_m^k where v_m^k is that of a_hat_m^k.

Where a tile spans a whole head the second line is the product's epilogue; else v is stored in float32 and a pass of
:mod:`rows` follows, for the projection takes a difference that 16 bits would lose.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends import around_product
from tde_kernels.backends.core import Kept
from tde_kernels.backends.grouped import Grouped, Rows, Wants
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.arithmetic import dot, rounded, rounded_to_tf32
from tde_kernels.backends.triton.effects import tile_of
from tde_kernels.backends.triton.norms import norm_factor
from tde_kernels.backends.triton.operand import kept_norm, operand, row_constant, row_starts
from tde_kernels.backends.triton.rows import PASSES, row_gradient, store_divisor_gradient


@triton.jit(do_not_specialize=["bucket"])
def _operand_gradient(
    grad,
    grad_stride_row,
    grad_stride_other,
    a,
    b,
    direction,
    alpha,
    out,
    grad_divisor,
    heads,
    width,
    bucket,
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
    rows, others = a.rows, b.rows
    per_head = tl.cdiv(width, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), heads * per_head, 8)
    head = tile_n // per_head
    row = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = (tile_n % per_head * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_exists = row < rows
    inside = channel < width
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
        norm = kept_norm(b, other, other_exists, head, heads)
        factor = row_constant(b, other, other_exists) * norm_factor(norm, b.offset, b.power, b.FACTOR)
        scaled = upstream.to(tl.float32) * factor[None, :]
        if PRECISION == "tf32":
            scaled = rounded_to_tf32(scaled)
        b_tile = tl.load(
            row_starts(b, other, head, width) + (channel * b.stride_col)[None, :],
            mask=other_exists[:, None] & inside[None, :],
            other=0.0,
        )
        v = dot(rounded(scaled, OPERAND), rounded(b_tile, OPERAND), v, PRECISION)
        if DIRECTED == "b":  # its projection has the factor in it
            along = tl.load(b.along + other * heads + head, mask=other_exists, other=0.0)
            towards_b += tl.sum(upstream.to(tl.float32) * along[None, :], 1)

    if DIRECTED == "b":
        towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)
        v -= (tl.load(alpha) * towards_b)[:, None] * towards[None, :]
    valid = row_exists[:, None] & inside[None, :]
    place = out + (row * (heads * width) + head * width)[:, None] + channel[None, :]
    if EPILOGUE == "scaled":
        v *= row_constant(a, row, row_exists)[:, None]
    if EPILOGUE == "projected":
        own = tl.load(row_starts(a, row, head, width) + (channel * a.stride_col)[None, :], mask=valid, other=0.0)
        own = own.to(tl.float32)
        towards_a = tl.zeros((BLOCK_N,), tl.float32)
        strength = 0.0
        if DIRECTED == "a":
            towards_a = tl.load(direction + head * width + channel, mask=inside, other=0.0)
            strength = tl.load(alpha)
        v, a_hat_v = row_gradient(
            a,
            v,
            own,
            towards_a,
            tl.sum(v * own, 1),
            tl.sum(v * towards_a[None, :], 1),
            tl.sum(own * towards_a[None, :], 1),
            strength,
            kept_norm(a, row, row_exists, head, heads),
            row_constant(a, row, row_exists),
            DIRECTED == "a",
        )
        if grad_divisor is not None:
            store_divisor_gradient(a, grad_divisor, a_hat_v, row, row_exists, head, heads)
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
    """The gradient ``[R, D]`` of ``own.a`` for ``grad [R, N]``; into ``grad_divisor [R]`` that of its divisor."""
    rows, others = grad.shape
    heads, dim = own.num_heads, own.a.shape[1]
    width = dim // heads
    choices = configs.tiles(rows, width, others, (own.a, other.a), columns=heads)
    whole = [c for c in choices if c["BLOCK_N"] >= width]
    if not own.factor.power and own.alpha is None and grad_divisor is None:
        epilogue = "scaled"
    elif whole:
        epilogue, choices = "projected", whole
    else:
        epilogue = "none"
    projected = epilogue == "projected"
    out = own.a.new_empty((rows, dim), dtype=torch.float32 if epilogue == "none" else own.a.dtype)
    shares = out.new_empty((rows, heads), dtype=torch.float32) if projected and grad_divisor is not None else None
    directed = "a" if own.alpha is not None else "b" if other.alpha is not None else "neither"
    direction = own if directed == "a" else other
    arguments = {
        "grad": grad,
        "grad_stride_row": grad.stride(0),
        "grad_stride_other": grad.stride(1),
        "a": operand(own, own_norms),
        "b": operand(other, other_norms, along_other),
        "direction": direction.direction,
        "alpha": direction.alpha,
        "out": out,
        "grad_divisor": shares,
        "heads": heads,
        "width": width,
        "bucket": launch.bucket(rows, others, heads, width),
        "DIRECTED": directed,
        "EPILOGUE": epilogue,
        **_multiplied_as(grad.dtype),
    }

    def programs(chosen: dict[str, Any]) -> int:
        tiles: int = triton.cdiv(rows, chosen["BLOCK_M"]) * heads * triton.cdiv(width, chosen["BLOCK_N"])
        return tiles

    launch.run_tuned(_operand_gradient, programs, grad.device, arguments, choices[0], choices[1:])
    if shares is not None and grad_divisor is not None:
        torch.sum(shares, 1, out=grad_divisor)
    return PASSES.backward(own, out, own_norms, grad_divisor) if epilogue == "none" else out


def _multiplied_as(dtype: torch.dtype) -> dict[str, Any]:
    """Gradients times scales leave float16's range: its tiles are multiplied as tf32, of the same mantissa."""
    if dtype == torch.float16:
        return {"OPERAND": tl.float32, "PRECISION": "tf32"}
    return {"OPERAND": launch.language_dtype(dtype), "PRECISION": launch.precision()}


def _operand(
    grad: Tensor,
    own: Rows,
    other: Rows,
    own_norms: Tensor | None,
    other_norms: Tensor | None,
    along_other: Tensor | None,
    grad_divisor: Tensor | None = None,
) -> Tensor:
    """The gradient of ``own.a`` by the plan for its shape."""
    if grad.shape[1] == 0:  # no rows to learn from, and no norms of a forward that never ran
        if grad_divisor is not None:
            grad_divisor.zero_()
        return torch.zeros_like(own.a, memory_format=torch.contiguous_format)
    if configs.around_library("backward", grad.shape[0], own.a.shape[1] // own.num_heads, grad.shape[1], grad.dtype):
        return around_product.operand_gradient(PASSES, grad, own, other, own_norms, None, grad_divisor)
    return _gradient(grad, own, other, own_norms, other_norms, along_other, grad_divisor)


def logits_backward(p: Grouped, grad: Tensor, saved: Kept, wants: Wants) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::logits_backward``."""
    norms_x, norms_w, along = saved[2:]
    dx, dw = (p.x.new_empty(0, dtype=torch.float32) for _ in range(2))
    dscale = p.x.new_empty(p.w.shape[0] if wants.class_scale else 0, dtype=torch.float32)
    if wants.x:
        dx = _operand(grad, p.features, p.weights, norms_x, norms_w, None)
    if wants.w or wants.class_scale:
        dw = _operand(grad.t(), p.weights, p.features, norms_w, norms_x, along, dscale if wants.class_scale else None)
    return dx, dw, dscale
