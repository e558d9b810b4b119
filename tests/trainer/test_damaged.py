"""Files that a run wrote, damaged afterwards: refused in one line that names them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tde_trainer.compare import load_summary
from tde_trainer.errors import UserError
from tde_trainer.evaluate import Features
from tde_trainer.feature_file import FeatureFile, load_features, save_features
from tde_trainer.posthoc.head_file import load_head, save_head
from tde_trainer.results import finished_cells

from tde_kernels import FusedTDEHead

TRIALS = 40


def head(path: Path) -> None:
    save_head(path, FusedTDEHead(12, 5))


def features(path: Path) -> None:
    splits = {name: Features(torch.randn(20, 12), torch.arange(20) % 5) for name in ("train", "val")}
    save_features(path, FeatureFile(splits, torch.full((5,), 4)))


def arrays(path: Path) -> None:
    np.savez_compressed(path, train_x=np.random.randn(20, 12), train_y=np.arange(20) % 5)


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [("a.safetensors", head, load_head), ("a.safetensors", features, load_features), ("a.npz", arrays, load_features)],
    ids=["head", "features", "arrays"],
)
@pytest.mark.parametrize("damage", ["a bit", "the end"])
def test_no_damaged_file_is_read(
    damage: str, name: str, write: Callable[[Path], None], read: Callable[[Path], object], tmp_path: Path
) -> None:
    path, rng = tmp_path / name, random.Random(0)
    write(path)
    whole = path.read_bytes()
    read(path)
    for _ in range(TRIALS):
        place = rng.randrange(len(whole))
        end = b"" if damage == "the end" else bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        path.write_bytes(whole[:place] + end)
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            # A zip file says some things twice, and some, such as times, that nobody reads.
            assert name == "a.npz" and damage == "a bit"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracy": {"without_tde": {"many": "x"}, "with_tde": None}}, "accuracy.without_tde.many is a str"),
        ({"accuracy": {"without_tde": {}, "with_tde": None}}, "it lacks accuracy.without_tde."),
        ({"accuracy": []}, "accuracy is a list"),
        ({"alpha": {}}, "it lacks alpha.value"),
        ({"class_counts": [1, "x"]}, "class_counts[1] is a str"),
        ({"versions": None}, "versions is null"),
        ({"config": {"task": "x"}}, "unknown task 'x'"),
    ],
)
def test_results_of_another_form(change: dict[str, Any], said: str, tiny_run: Path, tmp_path: Path) -> None:
    cell = Path(shutil.copytree(tiny_run / "deconfound/seed0", tmp_path / "cell"))
    values = json.loads((cell / "results.json").read_text())
    (cell / "results.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError) as error:
        finished_cells(cell)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "row", [{}, {"name": "linear"}, {"name": "linear", "many": {"mean": "x", "std": None, "n": 1}}, 0]
)
def test_summaries_of_another_form(row: Any, tiny_run: Path, tmp_path: Path) -> None:
    values = json.loads((tiny_run / "results.json").read_text())
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**values, "rows": [row]}))
    with pytest.raises(UserError, match=rf"{path} was not written by a run: .*rows\[0\]"):
        load_summary(path)


@pytest.mark.parametrize("config", [{}, {"methods": "linear", "seeds": [0]}, {"methods": [0], "seeds": [0]}])
def test_settings_of_another_form(config: dict[str, Any], tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "run.json").write_text(json.dumps({"config": config, "command": "tde train"}))
    with pytest.raises(UserError, match=f"{run / 'run.json'} was not written by a run: "):
        finished_cells(run)
