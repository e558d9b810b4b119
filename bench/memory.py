"""The most memory that a call takes beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch


def _process_bytes(field: str) -> int:
    """A size from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Bytes of the device's memory, or on the CPU of this process's, that ``run`` takes at its most.

    The process's memory grows by whole pages and holds what libraries keep: below a megabyte it says nothing.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed blocks that the allocator keeps would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    held = _process_bytes("VmRSS")
    run()
    return _process_bytes("VmHWM") - held
