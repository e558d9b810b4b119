"""Passes over the rows of one operand: the prologue and the epilogue of a product that is another library's.

out^k = c f(||a^k||) (a^k - alpha <a^k, d^k> d^k),     c = scale / divisor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.arithmetic import rounded
from tde_kernels.backends.triton.norms import exact_norm, factor_kind, norm_factor, tangent


@triton.jit
def row_constant(scale, divisor, row, exists):
    """``c`` of each row."""
    constant = tl.full(row.shape, 1.0, tl.float32) * scale
    if divisor is not None:
        constant = scale / tl.load(divisor + row, mask=exists, other=1.0)
    return constant


@triton.jit
def _normalize(
    a,
    out,
    norms,
    along,
    divisor,
    direction,
    alpha,
    rows,
    heads,
    width,
    stride_row,
    stride_col,
    scale,
    offset,
    power,
    FACTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    head = tl.program_id(0) % heads
    row = tl.cast(tl.program_id(0) // heads, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    within = tl.arange(0, BLOCK_COLUMNS)
    first = a + (row * stride_row)[:, None] + tl.cast(head, tl.int64) * width * stride_col
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    shares = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        channel = (start + within).to(tl.int64)
        inside = channel < width
        tile = tl.load(first + (channel * stride_col)[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        tile = tile.to(tl.float32)
        squares += tl.sum(tile * tile, 1)
        if direction is not None:
            towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)
            shares += tl.sum(tile * towards[None, :], 1)
    factor = row_constant(scale, divisor, row, exists)
    if FACTOR != "one":
        norm = exact_norm(squares, first, stride_col, width, exists, BLOCK_COLUMNS)
        if norms is not None:
            tl.store(norms + row * heads + head, norm, mask=exists)
        factor *= norm_factor(norm, offset, power, FACTOR)
    if along is not None:
        tl.store(along + row * heads + head, shares * factor, mask=exists)
    for start in range(0, width, BLOCK_COLUMNS):
        channel = (start + within).to(tl.int64)
        inside = channel < width
        valid = exists[:, None] & inside[None, :]
        tile = tl.load(first + (channel * stride_col)[None, :], mask=valid, other=0.0).to(tl.float32)
        if alpha is not None:
            towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)
            tile -= (tl.load(alpha) * shares)[:, None] * towards[None, :]
        place = out + (row * (heads * width) + head * width)[:, None] + channel[None, :]
        tl.store(place, rounded((tile * factor[:, None]), out.dtype.element_ty), mask=valid)


@triton.jit
def row_gradient(
    v,
    a,
    towards,
    v_a,
    v_towards,
    a_towards,
    strength,
    norm,
    constant,
    offset,
    power,
    FACTOR: tl.constexpr,
    DIRECTED: tl.constexpr,
):
    """The gradient of ``a`` from ``v``, that of ``out``, and ``<out, v>`` of each row, from the row's dot products.

    ``v_a``, ``v_towards`` and ``a_towards`` are ``<v, a>``, ``<v, d>`` and ``<a, d>``, each over the whole head.
    """
    if DIRECTED:
        v -= (strength * v_towards)[:, None] * towards[None, :]
        v_a -= strength * v_towards * a_towards
    factor = norm_factor(norm, offset, power, FACTOR)
    gradient = tangent(v, a, v_a, norm, factor, offset, power, FACTOR) * constant[:, None]
    return gradient, v_a * factor * constant


@triton.jit
def _backward(
    v,
    a,
    out,
    norms,
    divisor,
    grad_divisor,
    direction,
    alpha,
    rows,
    heads,
    width,
    stride_row,
    stride_col,
    scale,
    offset,
    power,
    FACTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    head = tl.program_id(0) % heads
    row = tl.cast(tl.program_id(0) // heads, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    within = tl.arange(0, BLOCK_COLUMNS)
    first = a + (row * stride_row)[:, None] + tl.cast(head, tl.int64) * width * stride_col
    place = (row * (heads * width) + head * width)[:, None]
    v_a = tl.zeros((BLOCK_ROWS,), tl.float32)
    v_towards = tl.zeros((BLOCK_ROWS,), tl.float32)
    a_towards = tl.zeros((BLOCK_ROWS,), tl.float32)
    strength = 0.0
    if direction is not None:
        strength = tl.load(alpha)
    for start in range(0, width, BLOCK_COLUMNS):
        channel = (start + within).to(tl.int64)
        inside = channel < width
        valid = exists[:, None] & inside[None, :]
        a_tile = tl.load(first + (channel * stride_col)[None, :], mask=valid, other=0.0).to(tl.float32)
        v_tile = tl.load(v + place + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        v_a += tl.sum(v_tile * a_tile, 1)
        if direction is not None:
            towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)
            v_towards += tl.sum(v_tile * towards[None, :], 1)
            a_towards += tl.sum(a_tile * towards[None, :], 1)
    norm = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if FACTOR != "one":
        norm = tl.load(norms + row * heads + head, mask=exists, other=1.0)
    constant = row_constant(scale, divisor, row, exists)
    out_v = v_a
    for start in range(0, width, BLOCK_COLUMNS):
        channel = (start + within).to(tl.int64)
        inside = channel < width
        valid = exists[:, None] & inside[None, :]
        a_tile = tl.load(first + (channel * stride_col)[None, :], mask=valid, other=0.0).to(tl.float32)
        v_tile = tl.load(v + place + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        towards = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        if direction is not None:
            towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)
        gradient, out_v = row_gradient(
            v_tile,
            a_tile,
            towards,
            v_a,
            v_towards,
            a_towards,
            strength,
            norm,
            constant,
            offset,
            power,
            FACTOR,
            direction is not None,
        )
        tl.store(out + place + channel[None, :], rounded(gradient, out.dtype.element_ty), mask=valid)
    if grad_divisor is not None:
        tl.store(
            grad_divisor + row * heads + head, -out_v / tl.load(divisor + row, mask=exists, other=1.0), mask=exists
        )


@dataclass(frozen=True)
class Rows:
    """One operand ``a [R, D]`` of a product, and how its rows are scaled."""

    a: Tensor
    num_heads: int
    factor: Sequence[float]
    scale: float = 1.0
    divisor: Tensor | None = None
    direction: Tensor | None = None
    alpha: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the rows are only scaled by a constant that the product can carry."""
        return not self.factor[1] and self.scale == 1 and self.divisor is None and self.alpha is None

    def _arguments(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "divisor": self.divisor,
            "direction": self.direction,
            "alpha": self.alpha,
            "rows": self.a.shape[0],
            "heads": self.num_heads,
            "width": self.a.shape[1] // self.num_heads,
            "stride_row": self.a.stride(0),
            "stride_col": self.a.stride(1),
            "scale": self.scale,
            "offset": self.factor[0],
            "power": self.factor[1],
            "FACTOR": factor_kind(self.factor[1]),
        }

    def _launch(self, kernel: Any, **arguments: Any) -> None:
        elements = 2048 if configs.aligned(self.a) else 512
        columns = min(triton.next_power_of_2(self.a.shape[1] // self.num_heads), elements)
        config = {"BLOCK_ROWS": elements // columns, "BLOCK_COLUMNS": columns, "num_warps": 4, "num_stages": 2}
        programs = triton.cdiv(self.a.shape[0], config["BLOCK_ROWS"]) * self.num_heads
        launch.run(kernel, programs, self.a.device, {**self._arguments(), **arguments}, config)

    def normalize(self, dtype: torch.dtype, norms: Tensor | None, along: Tensor | None) -> Tensor:
        """The scaled rows ``[R, D]`` in ``dtype``; fills ``norms [R, K]`` and ``along [R, K]``."""
        out = self.a.new_empty(self.a.shape, dtype=dtype)
        self._launch(_normalize, out=out, norms=norms, along=along)
        return out

    def backward(self, v: Tensor, norms: Tensor | None, grad_divisor: Tensor | None) -> Tensor:
        """The gradient of ``a`` from ``v [R, D]``, that of the scaled rows, in whose memory it lies if dtypes agree."""
        out = v if v.dtype == self.a.dtype else torch.empty_like(v, dtype=self.a.dtype)
        self._launch(_backward, v=v, out=out, norms=norms, grad_divisor=grad_divisor)
        return out
