"""What every launch needs: the current stream of a tensor's device, and memory to work in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tde_kernels.backends.arrivals import arrivals


@contextmanager
def stream_of(tensor: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, which is made the current one."""
    if not tensor.is_cuda:
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream(tensor.device).cuda_stream


def scratch(like: Tensor, wanted: Any) -> tuple[Tensor, Tensor]:
    """Floats and counters, as many as the core's ``Scratch`` says. The caller keeps them alive over the launch."""
    return like.new_empty(wanted.floats, dtype=torch.float32), arrivals(like, wanted.counters)
