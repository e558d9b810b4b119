"""Two processes: every rank holds the EMA of the whole batch, however unequally the ranks share it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tde_kernels import FusedTDEHead
from tde_kernels import functional as F

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
WORLD, D, C = 2, 12, 5


def batches(sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """The same on every rank: what each of them holds."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, D, generator=generator) + rank for rank, size in enumerate(sizes)]


def gathered(value: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(value) for _ in range(WORLD)]
    dist.all_gather(parts, value)
    return parts


def check_ema(rank: int) -> None:
    for sizes in ((3, 40), (0, 7), (7, 0), (0, 0)):
        for backend in ("reference", None):
            parts = batches(sizes)
            head = FusedTDEHead(D, C, backend=backend)
            torch.nn.init.ones_(head.ema)
            head(parts[rank])
            whole = torch.cat(parts)
            want = 0.9 * torch.ones(D) + whole.mean(0) if len(whole) else torch.ones(D)
            torch.testing.assert_close(head.ema, want)
            assert head.num_updates == (1 if len(whole) else 0)
            assert all(torch.equal(part, head.ema) for part in gathered(head.ema))
    parts = batches((20, 30))
    masks = [part[:, 0] > 0.5 for part in parts]
    alone = F.update_head_ema_(torch.zeros(D), parts[rank], momentum=0.9, mask=masks[rank])
    torch.testing.assert_close(alone, torch.cat([p[m] for p, m in zip(parts, masks, strict=True)]).mean(0))
    nothing = masks[rank] & (rank == 1)  # one rank's mask is all false
    one = F.update_head_ema_(torch.zeros(D), parts[rank], momentum=0.9, mask=nothing)
    torch.testing.assert_close(one, parts[1][masks[1]].mean(0))


def check_groups(rank: int) -> None:
    own = [dist.new_group([r]) for r in range(WORLD)][rank]
    parts = batches((3, 4))
    ema = F.update_head_ema_(torch.zeros(D), parts[rank], momentum=0.9, group=own)
    torch.testing.assert_close(ema, parts[rank].mean(0))


def check_fit_direction(rank: int) -> None:
    parts = batches((11, 30))
    head = FusedTDEHead(D, C).fit_direction(parts[rank].split(4))
    torch.testing.assert_close(head.ema, torch.cat(parts).mean(0))


def check_ddp(rank: int) -> None:
    """Equal weights and averages after training on unequal data, and the loss falls."""
    torch.manual_seed(rank)
    network = nn.Sequential(nn.Linear(D, D), nn.ReLU(), FusedTDEHead(D, C))
    model = DistributedDataParallel(network)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(rank))
    y = x[:, :C].argmax(-1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    head = network[2]
    assert head.num_updates == 30 and head.ema.any()
    for value in (head.ema, head.weight.detach()):
        assert all(torch.equal(part, value) for part in gathered(value))


def worker(rank: int, port: int, check: Callable[[int], None]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        check(rank)
    finally:
        dist.destroy_process_group()


def check_all(rank: int) -> None:
    for check in (check_ema, check_groups, check_fit_direction, check_ddp):
        check(rank)


def test_two_processes() -> None:
    """All checks in one start, which is what takes the time; a failure's traceback names the check."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, check_all), nprocs=WORLD, join=True)
