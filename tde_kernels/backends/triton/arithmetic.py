"""Products and roundings, which Triton's interpreter does otherwise than a device: there they are put right."""

from __future__ import annotations

import triton
import triton.language as tl

# Kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 before the first import)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(a, DTYPE: tl.constexpr):
    """``a`` in ``DTYPE``, to nearest, ties to even."""
    if INTERPRETED:  # which truncates to bfloat16
        if tl.bfloat16 == DTYPE:
            if a.dtype == tl.float32:
                bits = a.to(tl.uint32, bitcast=True)
                bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
                a = tl.where(a == a, bits.to(tl.float32, bitcast=True), float("nan"))
    return a.to(DTYPE)


@triton.jit
def rounded_to_tf32(a):
    """float32 ``a`` to the ten bits of mantissa that tensor cores read, which cut it off, always towards zero."""
    bits = (a.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(a == a, bits.to(tl.float32, bitcast=True), a)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b`` in float32."""
    if INTERPRETED:  # which holds bfloat16 as integers, and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def fma(a, b, c):
    """``a * b + c`` in float32, rounded once."""
    if INTERPRETED:  # which rounds the product too
        return (tl.cast(a, tl.float64) * tl.cast(b, tl.float64) + tl.cast(c, tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)
