"""Counters through which the last of a kernel's blocks knows itself; zero before every launch and after it."""

from __future__ import annotations

import torch
from torch import Tensor

_of_device: dict[torch.device, Tensor] = {}


def arrivals(like: Tensor, number: int) -> Tensor:
    """Zeros ``[number]`` int32 on the device of ``like``, which a kernel on the current stream hands back as zeros.

    Those of the default stream are kept, to save filling them: its kernels run one after the other. On another stream a
    graph may be under capture, or ``torch.compile`` may be about to capture one: it warms up in the graph's own memory,
    where nothing may be kept.
    """
    device = like.device
    if not like.is_cuda or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return torch.zeros(number, dtype=torch.int32, device=device)
    kept = _of_device.get(device)
    if kept is None or kept.shape[0] < number:
        kept = _of_device[device] = torch.zeros(max(number, 1024), dtype=torch.int32, device=device)
    return kept
