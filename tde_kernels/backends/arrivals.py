"""Counters through which the last of a kernel's blocks knows itself; zero before every launch and after it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_of_ema: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def arrivals(ema: Tensor | None, like: Tensor, number: int) -> Tensor:
    """Zeros ``[number]`` int32, which a kernel hands back as zeros: those of an EMA are kept, to save filling them.

    Work on one EMA is ordered by its caller, so no two kernels share them. A graph's own memory is not kept.
    """
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    kept = None if ema is None or capturing else _of_ema.get(ema)
    if kept is None or kept.shape[0] < number or kept.device != like.device:
        kept = torch.zeros(number, dtype=torch.int32, device=like.device)
        if ema is not None and not capturing:
            _of_ema[ema] = kept
    return kept
