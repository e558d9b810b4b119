"""One operand of a product as kernels see it: its rows, and the factors that scale them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends.grouped import Rows
from tde_kernels.backends.triton.norms import exact_norm, factor_kind, norm_factor


class Operand(NamedTuple):
    """A kernel's argument. Pointers that are None are neither read nor written."""

    a: Any  # [R, K * width]
    norms: Any  # [R, K] float32
    along: Any  # [R, K] float32: c f(||a^k||) <a^k, d^k>
    divisor: Any  # [R] float32
    rows: Any
    stride_row: Any
    stride_col: Any
    scale: Any
    offset: Any
    power: Any
    FACTOR: Any  # constexpr, of factor_kind


def operand(rows: Rows, norms: Tensor | None = None, along: Tensor | None = None) -> Operand:
    """``rows`` for a kernel that reads or writes their ``norms [R, K]`` and projections ``along [R, K]``."""
    a, (offset, power) = rows.a, rows.factor
    kind = tl.constexpr(factor_kind(power))
    scale = tl.constexpr(1.0) if rows.scale == 1 else rows.scale  # so that features cost no multiplication
    return Operand(a, norms, along, rows.divisor, a.shape[0], a.stride(0), a.stride(1), scale, offset, power, kind)


@triton.jit
def row_constant(operand, row, exists):
    """``c`` of each row."""
    constant = tl.full(row.shape, 1.0, tl.float32) * operand.scale
    if operand.divisor is not None:
        constant = operand.scale / tl.load(operand.divisor + row, mask=exists, other=1.0)
    return constant


@triton.jit
def row_starts(operand, row, head, width):
    """Where the ``head`` of each row begins, ``[R, 1]``."""
    return operand.a + (row * operand.stride_row + tl.cast(head, tl.int64) * width * operand.stride_col)[:, None]


@triton.jit
def measured_factor(operand, squares, row, exists, head, heads, width, writes, BLOCK: tl.constexpr):
    """``f`` of each row's norm, from its sum of squares; the norm is kept if this program ``writes`` it."""
    if operand.FACTOR == "one":
        return tl.full(row.shape, 1.0, tl.float32)
    else:
        first = row_starts(operand, row, head, width)
        norm = exact_norm(squares, first, operand.stride_col, width, exists, BLOCK)
        if operand.norms is not None:
            if writes:
                tl.store(operand.norms + row * heads + head, norm, mask=exists)
        return norm_factor(norm, operand.offset, operand.power, operand.FACTOR)


@triton.jit
def kept_norm(operand, row, exists, head, heads):
    """The norm of each row that the forward left; 1 where the factor has no use for one."""
    if operand.FACTOR == "one":
        return tl.full(row.shape, 1.0, tl.float32)
    else:
        return tl.load(operand.norms + row * heads + head, mask=exists, other=1.0)
