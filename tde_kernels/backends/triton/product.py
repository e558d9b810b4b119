"""The bare product of a library (cuBLAS, hipBLASLt), for the shapes at which it is ahead of a kernel of our own."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b^T`` of ``a [M, N]`` and ``b [P, N]`` of one dtype, accumulated in float32 and rounded to ``dtype``."""
    if a.dtype == dtype:
        return torch.mm(a, b.t())
    if a.is_cuda:
        return torch.mm(a, b.t(), out_dtype=dtype)
    return torch.mm(a.to(dtype), b.t().to(dtype))  # the interpreter's tensors: the CPU's product has no such option
