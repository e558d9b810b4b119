"""How many pieces a call is made of: kernels on a GPU, operators dispatched on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

OPERATORS = ("aten::", "tde::", "mkldnn::")


def _outermost(event: Any) -> bool:
    """Whether no other operator called it."""
    outer = event.cpu_parent
    while outer is not None:
        if outer.name.startswith(OPERATORS):
            return False
        outer = outer.cpu_parent
    return True


def count(run: Callable[[], object], device: str) -> int:
    """Kernels that the device ran, copies aside; on the CPU operators, but for what compiled code runs by itself."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiled.events() or []
    if on_gpu:
        return sum(e.device_type == torch.profiler.DeviceType.CUDA and not e.name.startswith("Mem") for e in events)
    return sum(e.name.startswith(OPERATORS) and _outermost(e) for e in events)
