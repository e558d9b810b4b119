"""Every method in one run through the command line, on a tree of small images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from trainer_tools import FIRST_STAGE, NORMALISED, Tde, image_tree

SMALL = (
    "data.format=folder",
    "data.n_max=20",
    "data.ratio=10",
    "data.image_size=8",
    "data.val_per_class=2",
    "train.epochs=2",
    "train.batch_size=32",
    "train.lr=0.05",
    "head.alpha_steps=5",
    "seeds=[0]",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tree(tmp_path_factory.mktemp("tree"), {"train": [20] * 10, "test": [6] * 10})


@pytest.fixture(scope="module")
def run(tree: Path, tde: Tde, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "all"
    result = tde(*command(tree, run))
    assert result.exit_code == 0, result.output
    return run


def command(tree: Path, run: Path) -> list[str]:
    methods = f"methods=[{','.join(FIRST_STAGE)}]"
    return ["train", "cifar10_lt", *SMALL, methods, f"data.root={tree}", f"out={run}"]


@pytest.mark.parametrize("name", FIRST_STAGE)
def test_it_trains_two_epochs(name: str, run: Path) -> None:
    cell: dict[str, Any] = json.loads((run / name / "seed0/results.json").read_text())
    assert (cell["method"], cell["epochs"], cell["config"]["data"]["n_max"]) == (name, 2, 20)
    assert cell["class_counts"] == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]
    assert 0 <= cell["accuracy"]["without_tde"]["overall"] <= 1
    assert (cell["accuracy"]["with_tde"] is not None) == (name in NORMALISED) == (cell["alpha"] is not None)
    rows = [json.loads(line) for line in (run / name / "seed0/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)


def test_all_are_in_the_summary_the_normalised_ones_in_both_modes(run: Path) -> None:
    names = [row["name"] for row in json.loads((run / "results.json").read_text())["rows"]]
    assert names == [name + mode for name in FIRST_STAGE for mode in ("", " + TDE") if not mode or name in NORMALISED]


def test_eval_repeats_the_accuracy_of_every_method(run: Path, tde: Tde) -> None:
    result = tde("eval", run)
    assert result.exit_code == 0, result.output
    rows = json.loads((run / "results.json").read_text())["rows"]
    cells = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    shown = {row[1].strip(): row[-2].strip() for row in cells}
    assert shown == {row["name"]: f"{100 * row['overall']['mean']:.1f}" for row in rows}


def test_a_second_stage_has_the_branches_of_bbn(tree: Path, run: Path, tde: Tde, tmp_path: Path) -> None:
    second = ["train", "cifar10_lt", *SMALL, "method=joint", f"data.root={tree}", f"from={run / 'bbn'}"]
    result = tde(*second, f"out={tmp_path / 'second'}")
    assert result.exit_code == 2
    assert "trained with model.branches=2, while this is model.branches=1" in result.stderr
    result = tde(*second, "model.branches=2", f"out={tmp_path / 'second'}")
    assert result.exit_code == 0, result.output


def test_another_recipe_is_refused_on_resumption(tree: Path, run: Path, tde: Tde) -> None:
    before = (run / "run.json").read_bytes()
    for arguments, changed in (
        (["train", "digits_lt", f"out={run}"], "data.format, data.image_size, data.n_max, data.name"),
        ([*command(tree, run), "schedule=published"], "model.branches, schedule, train.decay"),
        ([*command(tree, run), "loss.ldam_margin=0.4"], "changed: loss.ldam_margin\n"),
        ([*command(tree, run), "data.subset_seed=1"], "changed: data.subset_seed\n"),
    ):
        result = tde(*arguments, "resume=true")
        assert result.exit_code == 2 and f"cannot resume {run} with another config" in result.stderr
        assert changed in result.stderr and len(result.stderr.splitlines()) == 1
    assert (run / "run.json").read_bytes() == before


def test_the_same_recipe_goes_on(tree: Path, run: Path, tde: Tde) -> None:
    result = tde(*command(tree, run), "resume=true")
    assert result.exit_code == 0 and result.output.count("already finished") == len(FIRST_STAGE)


def test_a_tree_that_is_long_tailed_already(tmp_path: Path, tde: Tde) -> None:
    tree = image_tree(tmp_path / "tree", {"train": [12, 5, 1], "val": [6] * 3})
    few = [argument for argument in SMALL if not argument.startswith("data.n_max")]
    run = tmp_path / "run"
    result = tde("train", "tiny_imagenet_lt", *few, "methods=[deconfound]", f"data.root={tree}", f"out={run}")
    assert result.exit_code == 0, result.output
    assert "folder_lt, training images per class: 12, 5, 1: 3 classes, 18 images" in result.output
    assert json.loads((run / "deconfound/seed0/results.json").read_text())["class_names"][2] == "class02"
