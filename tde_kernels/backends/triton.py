"""The Triton backend: a name that is reserved, and refuses, until its kernels are written."""

from __future__ import annotations

import torch


def refusal(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve ``op``."""
    return "its kernels are not written yet"
