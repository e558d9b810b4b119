"""Weights taken over, drawn, saved and loaded by any number of ranks."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.tensor import DTensor

from class_parallel_checks.common import (
    ROWS,
    C,
    D,
    K,
    check,
    heads,
    mild,
    own_classes,
    own_rows,
    rank,
    ranks,
    refused,
)
from tde_kernels import ClassParallelTDEHead, FusedTDEHead


@check
def taken_over_weights() -> None:
    linear = nn.Linear(D, C, bias=False)
    dist.broadcast(linear.weight.data, 0)
    part = ClassParallelTDEHead.from_linear(linear)
    assert torch.equal(part.weight, linear.weight[own_classes(part)])
    published = {"fc.weight": linear.weight.detach(), "embed": torch.arange(D).float()}
    part = ClassParallelTDEHead.load_published(published)
    assert torch.equal(part.weight, linear.weight[own_classes(part)]) and part.ema[3] == 3 and part.num_updates == 1


@check
def random_weights_differ_between_shards() -> None:
    torch.manual_seed(11)
    part = ClassParallelTDEHead(D, C)
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, (part.weight.detach(), torch.rand(())))
    rows = torch.cat([weight for weight, _ in found])
    assert len(rows) == C and len(rows.unique(dim=0)) == C
    assert len({float(drawn) for _, drawn in found}) == 1  # ranks stay in step


@check
def checkpoints() -> None:
    """Saved by two ranks, read by all, by one, and by a head that knows no ranks."""
    p = mild("lws", torch.float32)
    pair = dist.new_group([0, 1])
    alone = [dist.new_group([r]) for r in range(ranks())][rank()]
    with tempfile.TemporaryDirectory() as fresh:
        folder = [fresh]
        dist.broadcast_object_list(folder)
        if rank() < 2:
            _, part = heads(p, group=pair)
            part.ema.copy_(torch.arange(D))
            part.num_updates.fill_(4)
            checkpoint.save({"head": part.state_dict()}, checkpoint_id=folder[0], process_group=pair)
        dist.barrier()
        want = heads(p)[0]
        for group in (None, alone):
            part = ClassParallelTDEHead(D, C, normalizer="lws", num_heads=K, group=group)
            state = {"head": part.state_dict()}
            checkpoint.load(state, checkpoint_id=folder[0], process_group=group)
            part.load_state_dict(state["head"])
            own = part.shards.of(part.ranks.rank)
            assert torch.equal(part.weight, want.weight[own.start : own.stop])
            assert torch.equal(part.class_scale, want.class_scale[own.start : own.stop])
            assert torch.equal(part.ema, torch.arange(D).float()) and part.num_updates == 4
        whole = FusedTDEHead(D, C, normalizer="lws", num_heads=K)
        state = {"head": whole.state_dict()}
        checkpoint.load(state, checkpoint_id=folder[0], process_group=alone)
        whole.load_state_dict(state["head"])
        assert torch.equal(whole.weight, want.weight) and torch.equal(whole.ema, torch.arange(D).float())
        dist.barrier()


@check
def states() -> None:
    p = mild("lws", torch.float32)
    whole, part = heads(p)
    state = part.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert isinstance(state["weight"], DTensor) and state["weight"].shape == (C, D)
    assert torch.equal(state["weight"].full_tensor(), p.w) and torch.equal(
        state["class_scale"].full_tensor(), p.class_scale
    )
    for given in (state, whole.state_dict(), {name: a.double() for name, a in whole.state_dict().items()}):
        other = ClassParallelTDEHead(D, C, normalizer="lws")
        other.load_state_dict(given)
        assert torch.equal(other.weight, part.weight) and torch.equal(other.class_scale, part.class_scale)
        assert other.weight.dtype == torch.float32
    of_more = ClassParallelTDEHead(D, C + 1, normalizer="lws").state_dict()  # the same shards, but for the last
    wrong = {
        "must hold all 37 classes": {**state, "weight": part.weight.detach()},
        "got (37, 24)": {**whole.state_dict(), "weight": torch.zeros(C, 2 * D)},
        "got (38, 12)": {**of_more},
        "Missing key": {name: value for name, value in state.items() if name != "class_scale"},
    }
    before = part.weight.detach().clone()
    for message, given in wrong.items():
        refused(lambda given=given: part.load_state_dict(given), message, RuntimeError)
        assert torch.equal(part.weight, before)

    twin = copy.deepcopy(part)
    x, y = own_rows(p.x), own_rows(torch.arange(ranks() * ROWS) % C)
    assert torch.equal(twin.loss(x, y), part.loss(x, y))
