"""Trainings: beside compiled and data-parallel networks, and over a mesh of data and classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from class_parallel_checks.common import (
    ROWS,
    SOME,
    C,
    D,
    check,
    device,
    heads,
    mild,
    own_classes,
    own_rows,
    rank,
    ranks,
    refused,
)
from tde_kernels import ClassParallelTDEHead, FusedTDEHead


class Model(nn.Module):
    """A network and its head, which is no part of what is data parallel."""

    def __init__(self, network: nn.Module, head: FusedTDEHead) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head.loss(self.network(x), y)


def trained(network: nn.Module, head: FusedTDEHead, x: Tensor, y: Tensor, run: nn.Module | None = None) -> None:
    model = Model(network, head) if run is None else run
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D))


def assert_trained_alike(part: ClassParallelTDEHead, whole: FusedTDEHead, got: nn.Module, want: nn.Module) -> None:
    for mine, one in zip(got.parameters(), want.parameters(), strict=True):
        full = mine.full_tensor() if isinstance(mine, DTensor) else mine
        torch.testing.assert_close(full, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.weight, whole.weight[own_classes(part)], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.ema, whole.ema, rtol=1e-4, atol=1e-5)
    assert part.num_updates == whole.num_updates == 5


@check
def beside_a_compiled_network() -> None:
    p, y = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    results = []
    for compiles in (False, True):
        model = Model(network(), heads(p)[1])
        run = torch.compile(model, backend="aot_eager") if compiles else model
        loss = run(own_rows(p.x), own_rows(y))
        loss.backward()
        results.append([loss.detach(), *(a.grad for a in model.parameters())])
        assert model.head.num_updates == 1
    torch.testing.assert_close(*results)


@check
def behind_a_data_parallel_network() -> None:
    p, y = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    y[::4] = -100
    for way in ("ddp", "ddp around all", "fsdp2"):
        (whole, part), want, got = heads(p), network(), network()
        trained(want, whole, p.x, y)
        if way == "ddp":
            trained(DistributedDataParallel(got), part, own_rows(p.x), own_rows(y))
        elif way == "fsdp2":
            fully_shard(got, mesh=init_device_mesh(device(), (ranks(),)))
            trained(got, part, own_rows(p.x), own_rows(y))
        else:
            model = Model(got, part)
            names = [f"head.{name}" for name in part.state_dict()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
            trained(got, part, own_rows(p.x), own_rows(y), DistributedDataParallel(model))
        assert_trained_alike(part, whole, got, want)


@check
def mesh() -> None:
    """Data along the first dimension, classes along the second."""
    grid = init_device_mesh(device(), (2, ranks() // 2), mesh_dim_names=("data", "class"))
    y = torch.arange(ranks() * ROWS) % C
    for normalizer in SOME:
        p, want, got = mild(normalizer, torch.float32), network(), network()
        whole, part = heads(p, group=grid)
        trained(want, whole, p.x, y)
        trained(DistributedDataParallel(got), part, own_rows(p.x), own_rows(y))
        assert_trained_alike(part, whole, got, want)
    assert part.ranks.size == 2 and part.data_ranks.size == ranks() // 2
    whole.fit_direction(p.x)
    part.fit_direction(own_rows(p.x))
    torch.testing.assert_close(part.ema, p.x.mean(0))
    alphas = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0]
    assert part.choose_alpha(own_rows(p.x), own_rows(y), alphas) == whole.choose_alpha(p.x, y, alphas)
    refused(lambda: ClassParallelTDEHead(D, C + (rank() == 3), group=grid), "the same num_classes")
    refused(lambda: ClassParallelTDEHead(D, C, tau=1.0 + (rank() > 1), group=grid), "the same tau")
    fresh = ClassParallelTDEHead(D, C, group=grid)
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, fresh.weight.detach())
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0][:5], found[1][:5])
    on_classes = ClassParallelTDEHead(D, C, group=grid["class"])
    assert on_classes.ranks.size == 2 and on_classes.data_ranks.size == 1
