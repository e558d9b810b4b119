"""BBN: two branches, one fed by the data, one by their reverse; training moves from the first to the second.

    z = W [2 l f_c(x_a); 2 (1 - l) f_r(x_b)],    loss = l CE(z, y_a) + (1 - l) CE(z, y_b),    l = 1 - (epoch / T)^2

with ``x_a`` drawn uniformly and the class of ``x_b`` with a probability inverse to its count. At test time features are
``[f_c(x); f_r(x)]``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tde_trainer.methods.base import Batch, Draw, Stage
from tde_trainer.methods.linear import Linear
from tde_trainer.schema import ModelConfig


def conventional_share(stage: Stage) -> float:
    """``l``, from 1 towards 0."""
    return 1 - stage.done**2


class BBN(Linear):
    """Both branches see both halves of the batch: they are the last block alone, and the backbone stays a backbone."""

    def model(self, config: ModelConfig) -> ModelConfig:
        """See `Method.model`. Other backbones have no branches: each half of their features stands for one."""
        return replace(config, branches=2) if config.name == "resnet32" else config

    def compose(self, images: Tensor, target: Tensor, stage: Stage, draw: Draw) -> Batch:
        """See `Method.compose`."""
        reversed_images, reversed_target = draw(-1.0)
        lam = images.new_full((), conventional_share(stage))
        return Batch(torch.cat([images, reversed_images]), target, reversed_target, lam)

    def mixed(self, features: Tensor, stage: Stage) -> Tensor:
        """See `Method.mixed`."""
        uniform, reverse = features.chunk(2)
        share, half = conventional_share(stage), features.shape[1] // 2
        return torch.cat([2 * share * uniform[:, :half], 2 * (1 - share) * reverse[:, half:]], 1)
