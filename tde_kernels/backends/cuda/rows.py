"""Passes over the rows of one operand: the prologue and the epilogue of a product that is cuBLAS's."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends import around_product, core
from tde_kernels.backends.cuda.device import stream_of
from tde_kernels.backends.grouped import Rows


class _Passes(around_product.DeviceProducts):
    """One launch a pass."""

    def normalize(
        self, rows: Rows, dtype: torch.dtype, *, norms: Tensor | None = None, along: Tensor | None = None
    ) -> Tensor:
        a = core.dense_rows(rows.a)
        out = a.new_empty(a.shape, dtype=dtype)
        with stream_of(a) as stream:
            core.compiled().cuda_normalize_rows(
                core.matrix(a),
                core.row_transform(rows),
                core.matrix(out),
                norms=core.address(norms),
                projections=core.address(along),
                stream=stream,
            )
        return out

    def backward(self, rows: Rows, v: Tensor, norms: Tensor | None, grad_divisor: Tensor | None) -> Tensor:
        a = core.dense_rows(rows.a)
        grad = v if v.dtype == a.dtype else torch.empty_like(v, dtype=a.dtype)
        with stream_of(a) as stream:
            core.compiled().cuda_normalize_rows_backward(
                core.matrix(v),
                core.matrix(a),
                core.address(norms),
                core.row_transform(rows),
                core.matrix(grad),
                grad_divisor=core.address(grad_divisor),
                stream=stream,
            )
        return grad


PASSES = _Passes()
