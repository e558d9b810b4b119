"""Device functions on the norms of rows: the two factors of Eq. 10, and norms whose squares leave float32."""

from __future__ import annotations

import triton
import triton.language as tl

from tde_kernels.backends.triton.arithmetic import fma

# Outside these a sum of squares has overflowed, or lost small elements to underflow
_LARGEST = tl.constexpr(2.0**120)
_SMALLEST = tl.constexpr(2.0**-90)
_UNIT = tl.constexpr(2.0**80)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)


def factor_kind(power: float) -> str:
    """The compile-time choice of ``(n + offset)^-power``: no factor, a reciprocal, or the general power."""
    return {0.0: "one", 1.0: "reciprocal"}.get(float(power), "power")


@triton.jit
def inverse_power(base, power):
    """``base^-power``: the exponent's share is split into an integer and a rest, so that neither is rounded."""
    bits = base.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    whole = tl.floor(0.5 - power * exponent)
    rest = fma(-power, exponent, -whole)
    return tl.exp2(rest - power * tl.log2(mantissa)) * tl.exp2(whole)


@triton.jit
def norm_factor(norm, offset, power, FACTOR: tl.constexpr):
    """``f(n) = (n + offset)^-power``, and 0 where the base is 0: a zero head contributes 0."""
    if FACTOR == "one":
        return tl.full(norm.shape, 1.0, tl.float32)
    base = norm + offset
    zero = base < _SMALLEST_NORMAL
    safe = tl.where(zero, 1.0, base)
    if FACTOR == "reciprocal":
        result = 1.0 / safe
    else:
        result = inverse_power(safe, power)
    return tl.where(zero, 0.0, result)


@triton.jit
def exact_norm(squares, pointers, stride, width, present, BLOCK: tl.constexpr):
    """``sqrt(squares)``; rows whose squares left the range are read again, at another scale.

    ``pointers [R, 1]`` point at the first of the row's ``width`` elements; ``present [R]`` marks rows that exist.
    """
    norm = tl.sqrt_rn(squares)
    large = squares > _LARGEST
    again = present & (large | (squares < _SMALLEST))
    if tl.max(again.to(tl.int32), 0) > 0:
        unit = tl.where(large, 1.0 / _UNIT, _UNIT)
        rescaled = tl.zeros(squares.shape, tl.float32)
        columns = tl.arange(0, BLOCK)
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            offsets = (start + columns).to(tl.int64) * stride
            a = tl.load(pointers + offsets[None, :], mask=again[:, None] & inside[None, :], other=0.0)
            a = a.to(tl.float32) * unit[:, None]
            rescaled += tl.sum(a * a, 1)
        norm = tl.where(again, tl.sqrt_rn(rescaled) / unit, norm)
    return norm


@triton.jit
def tangent(v, a, along, norm, factor, offset, power, FACTOR: tl.constexpr):
    """The gradient of ``a`` from ``v``, that of ``f(||a||) a``, where ``along = <v, a>`` of the row.

    ``f v - f p <v, a> / (n (n + offset)) a``, in an order in which nothing overflows before the result does.
    """
    if FACTOR == "one":
        return v
    if FACTOR == "reciprocal":
        power = 1.0
    zero = norm < _SMALLEST_NORMAL
    cosine = tl.where(zero, 0.0, along / tl.where(zero, 1.0, norm))
    base = norm + offset
    shrunk = a / tl.where(base < _SMALLEST_NORMAL, 1.0, base)[:, None]
    return factor[:, None] * (v - (power * cosine)[:, None] * shrunk)
