"""A head over many classes: its data, its training on one process and on two, and what is said about wrong recipes."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tde_trainer.config import load_config, load_recipe
from tde_trainer.errors import UserError
from tde_trainer.ranks import ON_CPU
from tde_trainer.scaling.data import class_means, samples, zipf_labels
from trainer_tools import TORCHRUN, Tde

TIMEOUT = 150.0  # seconds
EPOCHS, STEPS = 3, 8
TINY = ["data.classes=1001", "data.train_samples=512", "data.test_samples=128", "train.batch_size=64"]
TRAIN = ["train", "million_lt", *TINY, f"train.epochs={EPOCHS}", "train.threads=1"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tde: Tde) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("scaling") / "one"
    result = tde(*TRAIN, f"out={folder}")
    assert result.exit_code == 0, result.output
    assert "samples/s" in result.output and "holds 1,001 classes" in result.output
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two."""
    folder = tmp_path_factory.mktemp("scaling") / "two"
    launch = [*TORCHRUN, "2", "-m", "tde_trainer"]
    ended = subprocess.run([*launch, *TRAIN, f"out={folder}"], timeout=TIMEOUT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


def values(run: Path, method: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / method / "seed0/results.json").read_text())
    return found


@pytest.mark.parametrize("method", ["all_classes", "sampled"])
def test_the_loss_falls(one: Path, method: str) -> None:
    losses = values(one, method)["losses"]
    assert len(losses) == EPOCHS * STEPS and sum(losses[-STEPS:]) < 0.9 * sum(losses[:STEPS])


@pytest.mark.skipif(not ON_CPU, reason="two processes would share the GPU, which NCCL refuses")
def test_two_processes_train_as_one_and_hold_half(one: Path, two: Path) -> None:
    ours, theirs = values(two, "all_classes"), values(one, "all_classes")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["accuracy"] == theirs["accuracy"]
    assert [rank["classes"] for rank in ours["ranks"]] == [501, 500]
    assert [rank["weights"] for rank in ours["ranks"]] == [rank["gradients"] for rank in ours["ranks"]]
    assert theirs["ranks"][0]["weights"] == 1001 * 64 * 4 == sum(rank["weights"] for rank in ours["ranks"])
    assert all(rank["peak"] >= rank["before"] > 0 for rank in ours["ranks"])


@pytest.mark.skipif(not ON_CPU, reason="two processes would share the GPU, which NCCL refuses")
def test_two_processes_learn_from_sampled_classes(two: Path) -> None:
    losses = values(two, "sampled")["losses"]
    assert sum(losses[-STEPS:]) < 0.9 * sum(losses[:STEPS])


def test_labels_follow_the_law_of_zipf() -> None:
    labels, classes = zipf_labels(200_000, 1000, seed=3), torch.arange(1000).double()
    assert labels.min() >= 0 and labels.max() < 1000
    wanted = torch.log1p(1 / (classes + 1)) / math.log(1001)
    share = torch.bincount(labels, minlength=1000) / len(labels)
    assert (
        wanted.sum().item() == pytest.approx(1) and ((share - wanted).abs() < 5 * (wanted / len(labels)).sqrt()).all()
    )


def test_class_means_are_like_coins() -> None:
    means = class_means(torch.arange(2000), 64)
    assert set(means.unique().tolist()) == {-1, 1} and len(means.unique(dim=0)) == 2000
    assert means.mean().abs() < 5 / math.sqrt(means.numel())
    agreement = (means @ means.t() / 64)[~torch.eye(2000, dtype=torch.bool)]
    assert agreement.mean().abs() < 0.01 and agreement.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_samples_are_their_means_and_noise() -> None:
    labels = torch.tensor([5, 999_999, 5])
    means, drawn = class_means(labels, 4000), samples(labels, 4000, 0.3, seed=1)
    assert torch.equal(means[0], means[2]) and not torch.equal(drawn[0], drawn[2])
    assert (drawn - means).std().item() == pytest.approx(0.3, rel=0.05)
    assert torch.equal(drawn, samples(labels, 4000, 0.3, seed=1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=al_classes"], r"unknown method 'al_classes'; did you mean 'all_classes'\?"),
        (["data.name=digits_lt"], "unknown data.name 'digits_lt'; did you mean .million_lt"),
        (["train.batch_size=100"], "data.train_samples=1280 must be a multiple of train.batch_size=100"),
        (["head.num_heads=3"], "model.features=64 must be a multiple of head.num_heads=3"),
        (["head.sample_rate=0"], "head.sample_rate=0.0 is out of range"),
        (["data.clases=5"], "unknown key 'data.clases'; did you mean 'data.classes'"),
    ],
)
def test_a_wrong_recipe_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("million_lt", overrides)


def test_what_is_for_classifiers_takes_no_heads_alone() -> None:
    with pytest.raises(UserError, match=r"^recipe million_lt trains heads alone; this is for classifiers$"):
        load_config("million_lt")


def test_a_loss_that_is_no_number_is_the_users(tmp_path: Path, tde: Tde) -> None:
    result = tde(*TRAIN, "method=all_classes", "train.lr=1e38", f"out={tmp_path / 'run'}")
    assert result.exit_code == 2 and "error: the loss is nan in epoch 1; a lower train.lr may help" in result.output
