"""The Triton backend: every op on any GPU that Triton serves, one file per op.

Triton itself is imported with ``kernels``, by the first op that runs, not with the package.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from functools import cache

import torch

OLDEST = (3, 6)


@cache
def _installation_refusal() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:  # "3.7rc1" has no third number yet
        return f"it needs Triton {'.'.join(map(str, OLDEST))} or newer, found {version}"
    return None


@cache
def _device_refusal(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if device.type == "cpu":
        return None if interpreted else "it serves GPUs (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"
    if interpreted:
        return "TRITON_INTERPRET is set: its kernels run on the CPU"
    if device.type != "cuda":
        return f"it serves CUDA and ROCm devices, not {device.type}"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it serves GPUs of compute capability 8.0 and newer, not {torch.cuda.get_device_name(device)}"
    return None


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot run on the device, or None."""
    return _installation_refusal() or _device_refusal(device)


def refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve ``op``, or None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it serves float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if torch.compiler.is_compiling():
        from tde_kernels.backends.traced import triton_unavailable

        traced: str | None = triton_unavailable(device)
        return traced
    return unavailable(device)
