"""Training on a GPU: the host never waits for it within an epoch."""

from __future__ import annotations

import pytest
import torch
from tde_trainer.config import load_config
from tde_trainer.data import Pipeline
from tde_trainer.methods import METHODS, Stage
from tde_trainer.network import build_network
from torch import Tensor

PIPELINE = Pipeline((0.5,) * 3, (0.25,) * 3, padding=1, flip=True, jitter=0.4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(METHODS))
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    config = load_config("cifar10_lt")
    images = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8, device="cuda")
    target = torch.randint(10, (32,), device="cuda")
    stage = Stage(torch.arange(10, 0, -1, device="cuda"), 0.9, config.loss)
    network = build_network(config, name, 3, 10).cuda()

    def draw(power: float) -> tuple[Tensor, Tensor]:
        return PIPELINE(images, training=True), target.flip(0)

    def step() -> Tensor:
        batch = network.method.compose(PIPELINE(images, training=True), target, stage, draw)
        loss: Tensor = network(batch, stage)
        loss.backward()
        return loss

    step()  # compiles kernels, and fills what is cached
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
