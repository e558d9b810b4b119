"""Files with code in them: every reader refuses them in one line, and the code does not run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from tde_trainer import checkpoint, results, trained
from tde_trainer.config import load_recipe
from tde_trainer.data import DATASETS
from tde_trainer.data.listing import read_list
from tde_trainer.detection.annotations import read_annotations
from tde_trainer.detection.models import BACKBONES
from tde_trainer.errors import UserError
from tde_trainer.feature_file import load_features
from tde_trainer.fetch import published_weights
from tde_trainer.files import read_json
from tde_trainer.models import builder
from tde_trainer.network import Network, build_network
from tde_trainer.posthoc.head_file import load_head
from tde_trainer.posthoc.weights import read_checkpoint
from tde_trainer.results import Result
from tde_trainer.schema import Config, DataConfig, ModelConfig
from torchvision.datasets import CIFAR10
from trainer_tools import Payload, cifar_files, cifar_labels


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that there is once a payload has run."""
    return tmp_path / "ran"


def pickled(file: Path, ran: Path) -> None:
    file.write_bytes(pickle.dumps(Payload(ran)))


def in_a_checkpoint(file: Path, ran: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 2), "extra": Payload(ran)}, file)


def in_an_old_checkpoint(file: Path, ran: Path) -> None:
    torch.save({"extra": Payload(ran)}, file, _use_new_zipfile_serialization=False)


def in_an_array(file: Path, ran: Path) -> None:
    objects = np.empty(1, dtype=object)
    objects[0] = Payload(ran)
    with open(file, "wb") as opened:
        np.savez(opened, train_x=objects, train_y=np.zeros(1, dtype=int))


def in_one_array(file: Path, ran: Path) -> None:
    with open(file, "wb") as opened:
        np.save(opened, np.array([Payload(ran)], dtype=object))


Wrong = Callable[[Path, Path], None]
Reader = Callable[[Path], object]


@pytest.mark.parametrize(
    ("name", "wrong", "read"),
    [
        ("a.pth", in_a_checkpoint, read_checkpoint),
        ("a.pth", in_an_old_checkpoint, read_checkpoint),
        ("a.pth", pickled, read_checkpoint),
        ("a.safetensors", in_a_checkpoint, read_checkpoint),
        ("a.npz", in_an_array, load_features),
        ("a.npz", in_one_array, load_features),
        ("a.npz", pickled, load_features),
        ("a.safetensors", pickled, load_features),
        ("tde_head.safetensors", in_a_checkpoint, load_head),
        ("results.json", pickled, read_json),
        ("train.json.gz", pickled, read_annotations),
        ("train.txt", pickled, read_list),
        ("recipe.yaml", pickled, lambda path: load_recipe(str(path))),
    ],
)
def test_a_payload_is_refused_and_not_run(name: str, wrong: Wrong, read: Reader, tmp_path: Path, ran: Path) -> None:
    file = tmp_path / name
    wrong(file, ran)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value) and not ran.exists()


def test_the_payload_runs_where_nobody_looks(tmp_path: Path, ran: Path) -> None:
    in_a_checkpoint(tmp_path / "a.pth", ran)
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize(
    "text",
    [
        "train: !!python/object/apply:pathlib.Path.touch [RAN]",
        "train: !!python/object/apply:os.system ['touch RAN']",
        "train: !!python/name:os.system",
        "out: !!python/object/new:pathlib.PosixPath [RAN]",
    ],
)
def test_a_recipe_builds_no_objects(text: str, tmp_path: Path, ran: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("RAN", str(ran)))
    with pytest.raises(UserError, match=f"recipe {recipe} is not valid YAML"):
        load_recipe(str(recipe))
    key, _, value = text.replace("RAN", str(ran)).partition(": ")
    with pytest.raises(UserError):
        load_recipe("digits_lt", [f"{key}={value}"])
    assert not ran.exists()


def test_cifars_pickles_are_read_only_with_the_published_sums(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        root = cifar_files(tmp_path / "cifar", CIFAR10, cifar_labels(10, 20), cifar_labels(10, 20), patch)
    pickled(root / CIFAR10.base_folder / "data_batch_1", ran)
    with pytest.raises(UserError, match="no intact copy of CIFAR10"):
        DATASETS["cifar10_lt"](DataConfig("cifar10_lt", str(root)), 0)
    assert not ran.exists()


class TestPublishedWeights:
    """Libraries load them, from a cache that anyone may have written to."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Torch's own: what lies there is not fetched."""
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        folder = tmp_path / "hub/checkpoints"
        folder.mkdir(parents=True)
        return folder

    @pytest.mark.parametrize("wrong", [in_a_checkpoint, pickled])
    def test_torchvisions(self, wrong: Wrong, cache: Path, ran: Path) -> None:
        wrong(cache / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name, ran)
        with pytest.raises(UserError, match="cannot load the weights of resnet18") as error:
            builder("torchvision:resnet18")(ModelConfig(pretrained=True), 3)
        assert "\n" not in str(error.value) and not ran.exists()

    def test_a_detectors(self, cache: Path, ran: Path) -> None:
        in_a_checkpoint(cache / Path(torchvision.models.ResNet50_Weights.DEFAULT.url).name, ran)
        with pytest.raises(UserError, match="cannot load the weights of resnet50"):
            BACKBONES["resnet50"][0](True, True)
        assert not ran.exists()

    def test_whatever_a_library_asks_for(self, tmp_path: Path, ran: Path) -> None:
        in_a_checkpoint(tmp_path / "a.pth", ran)
        before = dict(os.environ)
        with pytest.raises(UserError, match="cannot load the weights of some"), published_weights("some"):
            torch.load(tmp_path / "a.pth", weights_only=False)
        assert not ran.exists() and dict(os.environ) == before


def test_a_run_is_read_without_its_published_weights(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built of a trained network gets a checkpoint's weights: it fetches none."""
    (result, *_) = results.finished_cells(tiny_run)
    config = {**result.values["config"], "model": {**result.values["config"]["model"], "pretrained": True}}
    asked: list[bool] = []

    def build(config: Config, *arguments: object) -> Network:
        asked.append(config.model.pretrained)
        return build_network(config, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trained, "build_network", build)
    monkeypatch.setattr(checkpoint, "load", lambda *arguments, **options: None)
    assert trained.TrainedCell(Result(result.directory, {**result.values, "config": config})).network
    assert asked == [False]
