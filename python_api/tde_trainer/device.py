"""Where a run computes: accelerate finds the device and the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration


def make_accelerator(precision: str) -> Accelerator:
    """An accelerator for a config's ``precision``; shuffling follows seed and epoch alone (see `train.seed_epoch`)."""
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )


def describe(accelerator: Accelerator) -> str:
    """The device in words, such as ``"cpu, 2 threads"``, and the number of ranks if there are several."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count > 1 else ''}" if device.type == "cpu" else ""
    ranks = f", {accelerator.num_processes} ranks" if accelerator.num_processes > 1 else ""
    return f"{name}{threads}{ranks}"


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with ``count`` CPU threads inside the block; 0 leaves the number alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
