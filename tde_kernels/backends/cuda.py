"""The CUDA backend: kernels of the compiled core on the tensor's device and the current stream.

With an emulated core (:mod:`tde_kernels.backends.core`) the same kernels run on tensors of the CPU, in tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from tde_kernels.backends import around_product, core
from tde_kernels.backends.arrivals import arrivals
from tde_kernels.backends.grouped import Grouped, Rows


def _build_refusal() -> str | None:
    if core.missing is not None:
        return core.missing
    info = core.compiled().build_info()
    return None if info.has_cuda else f"the compiled core has no CUDA kernels ({info.cuda})"


_BUILD_REFUSAL = _build_refusal()
_DEVICE = "cpu" if _BUILD_REFUSAL is None and core.compiled().build_info().emulated else "cuda"


@torch.compiler.assume_constant_result
@cache
def _device_refusal(index: int) -> str | None:
    """Why the device cannot run the kernels: a driver that is too old, an architecture that the binary lacks."""
    with torch.cuda.device(index):
        reason: str = core.compiled().cuda_probe()
    return f"device {index} cannot run its kernels ({reason})" if reason else None


def refusal(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve ``op``, or None."""
    if _BUILD_REFUSAL is not None:
        return _BUILD_REFUSAL
    if device_type != _DEVICE:
        return f"it serves tensors on a {_DEVICE.upper()} device, not on {device_type}"
    if dtype not in core.DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if _DEVICE == "cpu":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    reason: str | None = _device_refusal(torch.cuda.current_device())
    return reason


@contextmanager
def _stream_of(tensor: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, which is made the current one."""
    if not tensor.is_cuda:
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream(tensor.device).cuda_stream


class _Passes(around_product.DeviceProducts):
    """One launch a pass."""

    def normalize(
        self, rows: Rows, dtype: torch.dtype, *, norms: Tensor | None = None, along: Tensor | None = None
    ) -> Tensor:
        a = core.dense_rows(rows.a)
        out = a.new_empty(a.shape, dtype=dtype)
        with _stream_of(a) as stream:
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
        with _stream_of(a) as stream:
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
saves = around_product.saves


def logits(
    p: Grouped,
    mask: Tensor | None,
    ema: Tensor | None,
    num_updates: Tensor | None,
    *,
    momentum: float,
    take_sum: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """See ``tde::logits``."""
    outputs = around_product.logits(PASSES, p, dtype)
    sums = p.x.new_empty(p.x.shape[1] + 1 if take_sum else 0, dtype=torch.float32)
    if take_sum or ema is not None:
        _update_ema(ema, num_updates, p.x, mask, sums if take_sum else None, momentum)
    return *outputs, sums


logits_backward = partial(around_product.logits_backward, PASSES)


def background_exempt(p: Grouped, *, background: int, log: bool, dtype: torch.dtype) -> Tensor:
    """See ``tde::background_exempt``. The product is taken in float32: a difference follows it."""
    z, along_x, along_w = around_product.effects(PASSES, p)
    out = z if dtype == torch.float32 else torch.empty_like(z, dtype=dtype)
    with _stream_of(z) as stream:
        core.compiled().cuda_background_exempt(
            core.matrix(z),
            along_x.data_ptr(),
            along_w.data_ptr(),
            p.heads,
            core.address(p.alpha),
            background,
            log,
            core.matrix(out),
            stream,
        )
    return out


def _update_ema(
    ema: Tensor | None, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, sums: Tensor | None, momentum: float
) -> None:
    x = core.dense_rows(x)
    if x.shape[0] == 0:  # the sum of nothing; an EMA stays what it is
        if sums is not None:
            sums.zero_()
        return
    seen = core.matrix(x)
    scratch = core.compiled().cuda_update_ema_scratch(seen)
    floats = x.new_empty(scratch.floats, dtype=torch.float32)
    counters = arrivals(ema, x, scratch.counters)
    update = core.compiled().EmaUpdate(*map(core.address, (ema, num_updates, mask)), momentum, core.address(sums))
    with _stream_of(x) as stream:
        core.compiled().cuda_update_ema(seen, update, floats.data_ptr(), counters.data_ptr(), stream)
    core.mark_written(ema, num_updates)


def update_ema_(ema: Tensor, num_updates: Tensor | None, x: Tensor, mask: Tensor | None, *, momentum: float) -> None:
    """See ``tde::update_ema_``: one launch."""
    _update_ema(ema, num_updates, x, mask, None, momentum)


def feature_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``tde::feature_sum``."""
    out = x.new_empty(x.shape[1] + 1, dtype=torch.float32)
    _update_ema(None, None, x, mask, out, 0.0)
    return out


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float) -> None:
    """See ``tde::fold_ema_``."""
    with _stream_of(ema) as stream:
        core.compiled().cuda_fold_ema(
            ema.data_ptr(), core.address(num_updates), total.data_ptr(), ema.shape[0], momentum, stream
        )
    core.mark_written(ema, num_updates)


alpha_sweep = partial(around_product.alpha_sweep, PASSES)
topk = partial(around_product.topk, PASSES)
