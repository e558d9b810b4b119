"""``tde::head_direction``: the EMA as a unit direction in each head, zero where it is zero.

d_hat^k = ema^k / ||ema^k||
"""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.ops.library import define


def _fake(ema: Tensor, *, num_heads: int, backend: str) -> Tensor:
    return torch.empty_like(ema)


_run = define("head_direction(Tensor ema, *, int num_heads, str backend) -> Tensor", fake=_fake)


def head_direction(ema: Tensor, *, num_heads: int, backend: str) -> Tensor:
    """``[D]`` float32 of ``ema [D]`` float32."""
    result: Tensor = _run(ema, num_heads=num_heads, backend=backend)
    return result
