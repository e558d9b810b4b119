"""Two layers on every process, and a head of which each holds a part."""

from __future__ import annotations

import torch
from torch import nn

from tde_kernels import ClassParallelTDEHead
from tde_trainer.scaling.schema import METHODS, ScalingConfig

_BLOCK = 1 << 16  # classes whose first weights are drawn together


def build_backbone(config: ScalingConfig) -> nn.Module:
    """``[N, channels]`` to features ``[N, D]``."""
    hidden = config.model.hidden
    return nn.Sequential(nn.Linear(config.data.channels, hidden), nn.ReLU(), nn.Linear(hidden, config.model.features))


def build_head(config: ScalingConfig, method: str, seed: int, device: torch.device) -> ClassParallelTDEHead:
    """This process's part of the head. The first weights do not depend on the number of processes."""
    settings = config.head
    head = ClassParallelTDEHead(
        config.model.features,
        config.data.classes,
        num_heads=settings.num_heads,
        tau=settings.tau,
        gamma=settings.gamma,
        momentum=settings.momentum,
        sample_rate=METHODS[method](settings),
        seed=seed,
        device=device,
    )
    own, bound = head.shards.of(head.ranks.rank), head.in_features**-0.5
    for begin in range(own.start - own.start % _BLOCK, own.stop, _BLOCK):
        generator = torch.Generator().manual_seed(seed * config.data.classes + begin)
        drawn = torch.empty(_BLOCK, head.in_features).uniform_(-bound, bound, generator=generator)
        first, last = max(begin, own.start), min(begin + _BLOCK, own.stop)
        with torch.no_grad():
            head.weight[first - own.start : last - own.start] = drawn[first - begin : last - begin]
    return head
