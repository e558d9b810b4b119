"""Weights of all classes in a ``state_dict``: as a ``DTensor``, so that a checkpoint fits any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tde_kernels.class_parallel.collectives import Ranks
from tde_kernels.class_parallel.shards import Shards


def as_whole(local: Tensor, shards: Shards, ranks: Ranks) -> Tensor:
    """``[C, ...]`` of which ``local [c, ...]`` are this rank's classes, in the same memory."""
    if ranks.group is None or ranks.size == 1:
        return local
    mesh = DeviceMesh.from_group(ranks.group, local.device.type)
    shape = torch.Size([shards.classes, *local.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def own_part(whole: Tensor, shape: torch.Size, shards: Shards, ranks: Ranks) -> Tensor:
    """This rank's classes ``[c, ...]`` of ``whole [C, ...]``, a plain tensor or a ``DTensor`` of any placement.

    Raises:
        ValueError: ``whole`` does not hold all classes, ``shape``; on every rank where it is a ``DTensor``.
    """
    if whole.shape != shape:
        raise ValueError(f"must hold all {shards.classes} classes, {tuple(shape)}, got {tuple(whole.shape)}")
    own = shards.of(ranks.rank)
    if isinstance(whole, DTensor):
        members = [dist.get_rank()] if ranks.group is None else dist.get_process_group_ranks(ranks.group)
        if tuple(whole.placements) == (Shard(0),) and whole.device_mesh.mesh.flatten().tolist() == members:
            return whole.to_local()
        whole = whole.full_tensor()  # a message: what it depends on is alike on all ranks
    return whole[own.start : own.stop]
