"""`tde speed`: what it measures, and that it reads no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trainer_tools import Tde

SMALL = ("model.name=resnet10", "data.image_size=32", "train.batch_size=4", "methods=[deconfound]")


def test_it_measures_a_network_without_its_data(tde: Tde, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    result = tde(
        "speed", "tiny_imagenet_lt", *SMALL, "data.root=/nowhere", "--steps", 3, "--classes", 50, "--out", file
    )
    assert result.exit_code == 0, result.output
    record = json.loads(file.read_text())
    assert record["images"] == "synthetic" and "synthetic images" in result.output
    assert (record["batch_size"], record["image_size"], record["num_classes"]) == (4, 32, 50)
    assert 0 < record["head_ms"] < record["step_ms"]
    assert record["images_per_second"] == pytest.approx(4000 / record["step_ms"])
    assert record["head_share"] == pytest.approx(record["head_ms"] / record["step_ms"])
    assert "torch" in record["versions"]


def test_a_larger_head_takes_a_larger_share(tde: Tde, tmp_path: Path) -> None:
    shares = []
    for classes in (10, 20_000):
        file = tmp_path / f"{classes}.json"
        assert (
            tde("speed", "tiny_imagenet_lt", *SMALL, "--steps", 3, "--classes", classes, "--out", file).exit_code == 0
        )
        shares.append(json.loads(file.read_text())["head_share"])
    assert shares[1] > 2 * shares[0]


@pytest.mark.parametrize("option", ["--steps", "--classes"])
def test_none_of_either_is_refused(option: str, tde: Tde) -> None:
    assert tde("speed", "tiny_imagenet_lt", *SMALL, option, 0).exit_code == 2
