"""What the device decides: precision, the loss scale of fp16, and what it can't train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tde_trainer import checkpoint, results, run, train
from tde_trainer.config import load_config
from tde_trainer.data import DATASETS
from tde_trainer.device import make_accelerator
from tde_trainer.errors import UserError
from tde_trainer.evaluate import Features, extract
from tde_trainer.methods import Batch, Stage
from tde_trainer.network import Network, build_network
from tde_trainer.progress import Reporter
from tde_trainer.ranks import ON_CPU
from tde_trainer.train import Training
from tde_trainer.trained import TrainedCell
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD
from trainer_tools import TINY, Tde

EPOCHS, STEPS = 4, 6
RECIPE = ["train", "digits_lt", *TINY, f"train.epochs={EPOCHS}", "method=deconfound", "seeds=[0]"]
CELL = "deconfound/seed0"


@pytest.fixture(autouse=True)
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than all the rest."""
    monkeypatch.setattr(run, "write_report", lambda runs, path: {})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / CELL / "metrics.jsonl").read_text().splitlines()]


def kept(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / CELL / checkpoint.FILE, weights_only=True)
    return content


def test_an_accelerator_has_the_precision_asked_for_whatever_there_was_before() -> None:
    assert [make_accelerator(name).mixed_precision for name in ("fp32", "bf16", "fp32")] == ["no", "bf16", "no"]


@pytest.mark.skipif(not ON_CPU, reason="test_gpu_training.py does it on a GPU")
def test_bf16_trains_as_fp32_to_its_rounding(tmp_path: Path, tde: Tde) -> None:
    for precision in ("fp32", "bf16"):
        assert tde(*RECIPE, "model.features=64", f"precision={precision}", f"out={tmp_path / precision}").exit_code == 0
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert exact != rounded
    print([abs(a - b) / b for a, b in zip(rounded, exact, strict=True)])
    assert rounded == pytest.approx(exact, rel=10 * torch.finfo(torch.bfloat16).eps)
    network = kept(tmp_path / "bf16")["network"]
    assert {value.dtype for value in network.values()} == {torch.float32, torch.int64}


@pytest.mark.skipif(not ON_CPU, reason="test_gpu_training.py trains on a GPU")
def test_features_are_those_of_the_training_in_its_precision(
    tmp_path: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_training: list[Tensor] = []

    def kept_extract(*arguments: Any) -> Features:
        features = extract(*arguments)
        of_training.append(features.x)
        return features

    monkeypatch.setattr(train, "extract", kept_extract)
    for precision in ("bf16", "fp32"):
        assert tde(*RECIPE, f"precision={precision}", f"out={tmp_path / precision}").exit_code == 0
    # Both at once: neither may change how the other computes.
    cells = [TrainedCell(results.finished_cells(tmp_path / precision)[0]) for precision in ("bf16", "fp32")]
    again = [cell.features(split).x for cell in cells for split in ("val", "test")]
    assert [x.dtype for x in again] == [torch.float32] * 4
    assert all(torch.equal(x, wanted) for x, wanted in zip(again, of_training, strict=True))


class TestLossScale:
    """fp16 scales the loss, and skips a step whose gradients overflow. Here on the CPU, where accelerate does not."""

    @pytest.fixture(autouse=True)
    def scaled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every fifth step's gradient overflows, though its loss does not."""
        forward = Network.forward

        def scaling(precision: str) -> Accelerator:
            accelerator = make_accelerator(precision)
            accelerator.scaler = GradScaler(
                accelerator.device.type, growth_interval=3
            )  # doubles after so many good steps
            return accelerator

        def overflowing(network: Network, batch: Batch | Tensor, stage: Stage | None = None) -> Tensor:
            steep = 1e37 * network.head.weight[0, 0] if int(network.head.num_updates) % 5 == 0 else torch.zeros(())
            return forward(network, batch, stage) + (steep - steep.detach())

        monkeypatch.setattr(run, "make_accelerator", scaling)
        monkeypatch.setattr(Network, "forward", overflowing)

    @pytest.fixture
    def whole(self, tmp_path: Path, tde: Tde) -> Path:
        assert tde(*RECIPE, f"out={tmp_path / 'whole'}").exit_code == 0
        return tmp_path / "whole"

    def test_training_survives_skipped_steps(self, whole: Path) -> None:
        content, curve = kept(whole), losses(whole)
        # Each of the five halves it, and three good steps after each double it: without skips it would be 2^24.
        assert content["scaler"]["scale"] == 2.0**16
        assert curve[-1] < curve[0] and all(value.isfinite().all() for value in content["network"].values())
        assert content["network"]["head.num_updates"] == EPOCHS * STEPS

    def test_a_resumed_training_scales_as_the_first(
        self, whole: Path, tmp_path: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Reporter, "epoch_done", interrupt)
            assert tde(*RECIPE, f"out={tmp_path / 'resumed'}").exit_code == 130
        assert tde(*RECIPE, f"out={tmp_path / 'resumed'}", "resume=true").exit_code == 0
        ours, theirs = kept(tmp_path / "resumed"), kept(whole)
        assert ours["scaler"] == theirs["scaler"] and losses(tmp_path / "resumed") == losses(whole)
        assert all(torch.equal(ours["network"][name], value) for name, value in theirs["network"].items())


def test_a_checkpoint_without_a_loss_scale_does_not_fit_fp16(tmp_path: Path) -> None:
    network = build_network(load_config("digits_lt", TINY), "deconfound", 1, 10)
    checkpoint.save(tmp_path, network, SGD(network.parameters(), 0.1), checkpoint.Progress(seed=0))
    with pytest.raises(UserError, match="does not fit this run"):
        checkpoint.load(tmp_path, network, scaler=GradScaler("cpu"))


@pytest.mark.skipif(not ON_CPU, reason="a GPU can")
@pytest.mark.parametrize("setting", ["precision=fp16", "train.sync_batchnorm=true"])
def test_what_a_cpu_cannot_train_is_refused(setting: str, tmp_path: Path, tde: Tde) -> None:
    result = tde(*RECIPE, setting, f"out={tmp_path / 'run'}")
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {setting} needs")
    assert result.stderr.count("\n") == 1 and "got cpu" in result.stderr and not (tmp_path / "run").exists()


def test_synchronised_batch_norm_leaves_weights_and_their_names_as_they_are() -> None:
    config = load_config("digits_lt", [*TINY, "train.sync_batchnorm=true"])
    data = DATASETS["digits_lt"](config.data, 0)
    network = build_network(config, "linear", data.channels, data.num_classes)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    parameters = list(network.parameters())
    Training(data, network, SGD(network.parameter_groups(), 0.1), config, make_accelerator("fp32"), 0)
    kinds = {type(module) for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds == {torch.nn.SyncBatchNorm}
    assert all(ours is theirs for ours, theirs in zip(network.parameters(), parameters, strict=True))
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
