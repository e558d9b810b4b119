"""Passes over the rows of one operand: the prologue and the epilogue of a product that is cuBLAS's."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends import around_product, core
from tde_kernels.backends.cuda.device import stream_of
from tde_kernels.backends.cuda.ema import take_in
from tde_kernels.backends.grouped import Intake, Loss, LossPass, Rows
from tde_kernels.backends.loss_passes import ON_GPU, LossPasses, scaled
from tde_kernels.backends.sweep import SweepPasses


class _Passes(around_product.DeviceProducts, LossPasses, SweepPasses):
    """One launch a pass."""

    workspace = ON_GPU
    fewest_rows = 1024

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

    def scaled_features(self, rows: Rows, dtype: torch.dtype, intake: Intake) -> tuple[Tensor, Tensor | None, Tensor]:
        feature_sum = rows.a.new_empty(rows.a.shape[1] + 1 if intake.take_sum else 0, dtype=torch.float32)
        if intake.asked:
            take_in(rows.a, intake, feature_sum)
        return *scaled(self, rows, dtype), feature_sum

    def cross_entropy(self, z: Tensor, loss: Loss, classes: int, what: LossPass) -> None:
        options, todo = core.cross_entropy(loss, classes), core.loss_pass(what)
        with stream_of(z) as stream:
            core.compiled().cuda_cross_entropy(core.matrix(z), options, todo, stream)


PASSES = _Passes()
