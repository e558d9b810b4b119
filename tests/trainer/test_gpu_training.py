"""Training on a GPU: the host never waits for it within an epoch; half precision; synchronised batch norm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tde_trainer import checkpoint
from tde_trainer.config import load_config
from tde_trainer.data import Pipeline
from tde_trainer.methods import METHODS, Stage
from tde_trainer.network import build_network
from torch import Tensor
from trainer_tools import TINY, Tde

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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision: str, tmp_path: Path, tde: Tde) -> None:
    recipe = ["train", "digits_lt", *TINY, "model.features=64", "train.epochs=8", "method=deconfound", "seeds=[0]"]
    run = tmp_path / "run"
    result = tde(*recipe, f"precision={precision}", "train.sync_batchnorm=true", f"out={run}")
    assert result.exit_code == 0, result.output
    cell = run / "deconfound/seed0"
    curve = [json.loads(line)["loss"] for line in (cell / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1] < curve[0] / 2
    content = torch.load(cell / checkpoint.FILE, map_location="cpu", weights_only=True)
    assert all(value.isfinite().all() for value in content["network"].values())
    assert {value.dtype for value in content["network"].values()} == {torch.float32, torch.int64}
    assert bool(content["scaler"]) == (precision == "fp16")
    assert content["network"]["head.num_updates"] == len(curve) * 6
