"""The CUDA backend: kernels of the compiled core on the tensor's device and the current stream."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tde_kernels.backends import core

_SERVED = ("feature_sum", "fold_ema_")


def _build_refusal() -> str | None:
    if core.missing is not None:
        return core.missing
    info = core.compiled().build_info()
    return None if info.has_cuda else f"the compiled core has no CUDA kernels ({info.cuda})"


_BUILD_REFUSAL = _build_refusal()


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
    if device_type != "cuda":
        return f"it serves tensors on a CUDA device, not on {device_type}"
    if op not in _SERVED:
        return f"it has no kernel for {op} yet"
    if dtype not in core.served_dtypes():
        return f"it serves float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    reason: str | None = _device_refusal(torch.cuda.current_device())
    return reason


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def feature_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``tde::feature_sum``."""
    x = core.dense_rows(x)
    out = x.new_empty(x.shape[1] + 1, dtype=torch.float32)
    workspace = x.new_empty(core.compiled().cuda_feature_sum_workspace(*x.shape), dtype=torch.float32)
    with torch.cuda.device(x.device):
        core.compiled().cuda_feature_sum(
            core.matrix(x), core.address(mask), out.data_ptr(), workspace.data_ptr(), _stream(x)
        )
    return out


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float) -> None:
    """See ``tde::fold_ema_``."""
    with torch.cuda.device(ema.device):
        core.compiled().cuda_fold_ema(
            ema.data_ptr(), core.address(num_updates), total.data_ptr(), ema.shape[0], momentum, _stream(ema)
        )
    core.mark_written(ema, num_updates)
