"""Passes over the rows of one operand: the prologue and the epilogue of a product that is another library's.

out^k = c f(||a^k||) (a^k - alpha <a^k, d^k> d^k),     c = scale / divisor
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends import around_product
from tde_kernels.backends.grouped import Intake, Loss, LossPass, Rows
from tde_kernels.backends.loss_passes import ON_GPU, LossPasses, scaled
from tde_kernels.backends.sweep import SweepPasses
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.arithmetic import rounded
from tde_kernels.backends.triton.ema import take_in
from tde_kernels.backends.triton.norms import norm_factor, tangent
from tde_kernels.backends.triton.operand import kept_norm, measured_factor, operand, row_constant, row_starts
from tde_kernels.backends.triton.row_loss import row_loss


@triton.jit
def _rows_of_program(operand, heads, BLOCK_ROWS: tl.constexpr):
    """Head, rows, and which of those exist, of a program."""
    row = tl.cast(tl.program_id(0) // heads, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return tl.program_id(0) % heads, row, row < operand.rows


@triton.jit
def _normalize(operand, out, direction, alpha, heads, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    head, row, exists = _rows_of_program(operand, heads, BLOCK_ROWS)
    within = tl.arange(0, BLOCK_COLUMNS)
    first = row_starts(operand, row, head, width)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    shares = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        channel = (start + within).to(tl.int64)
        inside = channel < width
        valid = exists[:, None] & inside[None, :]
        tile = tl.load(first + (channel * operand.stride_col)[None, :], mask=valid, other=0.0).to(tl.float32)
        squares += tl.sum(tile * tile, 1)
        if direction is not None:
            towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)
            shares += tl.sum(tile * towards[None, :], 1)
    factor = measured_factor(operand, squares, row, exists, head, heads, width, True, BLOCK_COLUMNS)
    factor *= row_constant(operand, row, exists)
    if operand.along is not None:
        tl.store(operand.along + row * heads + head, shares * factor, mask=exists)
    place = out + (row * (heads * width) + head * width)[:, None]
    for start in range(0, width, BLOCK_COLUMNS):
        channel = (start + within).to(tl.int64)
        inside = channel < width
        valid = exists[:, None] & inside[None, :]
        tile = tl.load(first + (channel * operand.stride_col)[None, :], mask=valid, other=0.0).to(tl.float32)
        if alpha is not None:
            towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)
            tile -= (tl.load(alpha) * shares)[:, None] * towards[None, :]
        tl.store(place + channel[None, :], rounded(tile * factor[:, None], out.dtype.element_ty), mask=valid)


@triton.jit
def row_gradient(operand, v, a, towards, v_a, v_towards, a_towards, strength, norm, constant, DIRECTED: tl.constexpr):
    """The gradient of ``a`` from ``v``, that of ``out``, and ``<out, v>`` of each row, from the row's dot products.

    ``v_a``, ``v_towards`` and ``a_towards`` are ``<v, a>``, ``<v, d>`` and ``<a, d>``, each over the whole head.
    """
    if DIRECTED:
        v -= (strength * v_towards)[:, None] * towards[None, :]
        v_a -= strength * v_towards * a_towards
    factor = norm_factor(norm, operand.offset, operand.power, operand.FACTOR)
    gradient = tangent(v, a, v_a, norm, factor, operand.offset, operand.power, operand.FACTOR)
    return gradient * constant[:, None], v_a * factor * constant


@triton.jit
def store_divisor_gradient(operand, grad_divisor, out_v, row, exists, head, heads):
    """One head's share ``[R, K]`` of the gradient of the divisor."""
    divisor = tl.load(operand.divisor + row, mask=exists, other=1.0)
    tl.store(grad_divisor + row * heads + head, -out_v / divisor, mask=exists)


@triton.jit
def _backward(
    v, operand, out, grad_divisor, direction, alpha, heads, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    head, row, exists = _rows_of_program(operand, heads, BLOCK_ROWS)
    within = tl.arange(0, BLOCK_COLUMNS)
    first = row_starts(operand, row, head, width)
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
        a_tile = tl.load(first + (channel * operand.stride_col)[None, :], mask=valid, other=0.0).to(tl.float32)
        v_tile = tl.load(v + place + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        v_a += tl.sum(v_tile * a_tile, 1)
        if direction is not None:
            towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)
            v_towards += tl.sum(v_tile * towards[None, :], 1)
            a_towards += tl.sum(a_tile * towards[None, :], 1)
    norm = kept_norm(operand, row, exists, head, heads)
    constant = row_constant(operand, row, exists)
    out_v = v_a
    for start in range(0, width, BLOCK_COLUMNS):
        channel = (start + within).to(tl.int64)
        inside = channel < width
        valid = exists[:, None] & inside[None, :]
        a_tile = tl.load(first + (channel * operand.stride_col)[None, :], mask=valid, other=0.0).to(tl.float32)
        v_tile = tl.load(v + place + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        towards = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        if direction is not None:
            towards = tl.load(direction + head * width + channel, mask=inside, other=0.0)
        gradient, out_v = row_gradient(
            operand,
            v_tile,
            a_tile,
            towards,
            v_a,
            v_towards,
            a_towards,
            strength,
            norm,
            constant,
            direction is not None,
        )
        tl.store(out + place + channel[None, :], rounded(gradient, out.dtype.element_ty), mask=valid)
    if grad_divisor is not None:
        store_divisor_gradient(operand, grad_divisor, out_v, row, exists, head, heads)


class _Passes(around_product.DeviceProducts, LossPasses, SweepPasses):
    """One launch a pass, and the bare product of cuBLAS or hipBLASLt."""

    workspace = ON_GPU
    fewest_rows = 1024

    def normalize(
        self, rows: Rows, dtype: torch.dtype, *, norms: Tensor | None = None, along: Tensor | None = None
    ) -> Tensor:
        out = rows.a.new_empty(rows.a.shape, dtype=dtype)
        _launch(_normalize, rows, operand=operand(rows, norms, along), out=out)
        return out

    def backward(self, rows: Rows, v: Tensor, norms: Tensor | None, grad_divisor: Tensor | None) -> Tensor:
        out = v if v.dtype == rows.a.dtype else torch.empty_like(v, dtype=rows.a.dtype)
        shares = None if grad_divisor is None else v.new_empty((v.shape[0], rows.num_heads), dtype=torch.float32)
        _launch(_backward, rows, v=v, operand=operand(rows, norms), out=out, grad_divisor=shares)
        if grad_divisor is not None and shares is not None:
            torch.sum(shares, 1, out=grad_divisor)
        return out

    def scaled_features(self, rows: Rows, dtype: torch.dtype, intake: Intake) -> tuple[Tensor, Tensor | None, Tensor]:
        sums = take_in(rows.a, intake)
        return *scaled(self, rows, dtype), rows.a.new_empty(0, dtype=torch.float32) if sums is None else sums

    def cross_entropy(self, z: Tensor, loss: Loss, classes: int, what: LossPass) -> None:
        row_loss(z, loss, classes, what)


def _launch(kernel: Any, rows: Rows, **arguments: Any) -> None:
    width = rows.a.shape[1] // rows.num_heads
    config = configs.heads_of_rows(width, vectors=configs.aligned(rows.a))
    programs = triton.cdiv(rows.a.shape[0], config["BLOCK_ROWS"]) * rows.num_heads
    arguments |= {"direction": rows.direction, "alpha": rows.alpha, "heads": rows.num_heads, "width": width}
    launch.run(kernel, programs, rows.a.device, arguments, config)


PASSES = _Passes()
