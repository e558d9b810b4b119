"""The CUDA backend: kernels of the compiled core on the tensor's device and the current stream, one file per op.

With an emulated core (:mod:`tde_kernels.backends.core`) the same kernels run on tensors of the CPU, in tests.
"""

from __future__ import annotations

from functools import cache

import torch

from tde_kernels.backends import core


def _build_refusal() -> str | None:
    if core.missing is not None:
        return core.missing
    info = core.compiled().build_info()
    return None if info.has_cuda else f"the compiled core has no CUDA kernels ({info.cuda})"


_BUILD_REFUSAL = _build_refusal()
_DEVICE = "cpu" if _BUILD_REFUSAL is None and core.compiled().build_info().emulated else "cuda"


@cache
def device_refusal(index: int) -> str | None:
    """Why the device cannot run the kernels: a driver that is too old, an architecture that the binary lacks."""
    with torch.cuda.device(index):
        reason: str = core.compiled().cuda_probe()
    return f"device {index} cannot run its kernels ({reason})" if reason else None


def refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve ``op``, or None."""
    if _BUILD_REFUSAL is not None:
        return _BUILD_REFUSAL
    if device.type != _DEVICE:
        return f"it serves tensors on a {_DEVICE.upper()} device, not on {device.type}"
    if dtype not in core.DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if _DEVICE == "cpu":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.compiler.is_compiling():
        from tde_kernels.backends.traced import cuda_device_refusal

        traced: str | None = cuda_device_refusal(index)
        return traced
    return device_refusal(index)
