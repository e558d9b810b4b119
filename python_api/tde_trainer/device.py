"""Where a run computes: accelerate finds the device and the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration

from tde_trainer.errors import UserError
from tde_trainer.ranks import ON_CPU
from tde_trainer.schema import RunConfig, TrainConfig


def make_accelerator(precision: str) -> Accelerator:
    """An accelerator for a config's ``precision``; shuffling follows seed and epoch alone (see `epochs.seed_epoch`).

    Batches are those of all ranks together: each takes its part of every batch.
    """
    AcceleratorState._reset_state()  # a process may look at runs of several precisions
    return Accelerator(
        cpu=ON_CPU,
        mixed_precision="no" if precision == "fp32" else precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, non_blocking=True),
    )


def check_trainable(config: RunConfig, accelerator: Accelerator) -> None:
    """Whether the device and the ranks can train what ``config`` asks for.

    Raises:
        UserError: they can't.
    """
    on_gpu, ranks = accelerator.device.type == "cuda", accelerator.num_processes
    if config.precision == "fp16" and not on_gpu:
        raise UserError(f"precision=fp16 needs a GPU, got {accelerator.device}; bf16 and fp32 train there too")
    if isinstance(config.train, TrainConfig) and config.train.sync_batchnorm and not on_gpu:
        raise UserError(f"train.sync_batchnorm=true needs GPUs, got {accelerator.device}: torch has it on them alone")
    if config.train.batch_size % ranks:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is the batch of all processes together: it must be a multiple "
            f"of their number, {ranks}"
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
