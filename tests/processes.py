"""Several processes on this machine, in which checks run: functions of the rank."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp

Check = Callable[[int], None]


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def gathered(value: Tensor) -> list[Tensor]:
    """Every rank's ``value``."""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return parts


def start(backend: str, world: int, checks: tuple[Check, ...]) -> None:
    """All checks in one start, which is what takes the time; a failure's traceback names the check."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run, args=(port, backend, world, checks), nprocs=world, join=True)


def _run(rank: int, port: int, backend: str, world: int, checks: tuple[Check, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    try:
        for check in checks:
            check(rank)
    finally:
        dist.destroy_process_group()
