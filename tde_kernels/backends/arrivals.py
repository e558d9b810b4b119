"""Counters through which the last of a kernel's blocks knows itself; zero before every launch and after it."""

from __future__ import annotations

import torch
from torch import Tensor

_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def arrivals(like: Tensor, number: int) -> Tensor:
    """Zeros ``[number]`` int32 on the device of ``like``, which a kernel on the current stream hands back as zeros.

    Those of a stream are kept, to save filling them: its kernels run one after the other. A graph has its own, since it
    may be replayed beside them.
    """
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(number, dtype=torch.int32, device=like.device)
    place = like.device, torch.cuda.current_stream(like.device).cuda_stream
    kept = _of_stream.get(place)
    if kept is None or kept.shape[0] < number:
        kept = _of_stream[place] = torch.zeros(max(number, 1024), dtype=torch.int32, device=like.device)
    return kept
