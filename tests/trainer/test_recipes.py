"""Recipes, overrides, and what is said about wrong ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from tde_trainer.config import changed_keys, load_config, load_recipe
from tde_trainer.errors import UserError
from tde_trainer.recipe import recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads(name: str) -> None:
    assert load_recipe(name).out == f"runs/{name}"


def test_what_is_for_classifiers_takes_no_detectors() -> None:
    with pytest.raises(UserError, match=r"^recipe shapes_lvis trains detectors; this is for classifiers$"):
        load_config("shapes_lvis")


def test_overrides_beat_the_recipe_and_nest() -> None:
    config = load_config("digits_lt", ["train.epochs=5", "seeds=[7,8]", "methods=[deconfound]", "head.alpha=1.5"])
    assert (config.train.epochs, config.seeds, config.methods, config.head.alpha) == (5, [7, 8], ["deconfound"], 1.5)


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seeds: [4]\ntrain: {epochs: 3}\n")
    config = load_config(str(path))
    assert (config.seeds, config.train.epochs, config.out) == ([4], 3, "runs/mine")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epoch=5"], r"unknown key 'train.epoch'; did you mean 'train.epochs'\?"),
        (["sedes=[1]"], r"unknown key 'sedes'; did you mean 'seeds'\?"),
        (["methods=[deconfuond]"], r"unknown method 'deconfuond'; did you mean 'deconfound'\?"),
        (["data.name=digits"], r"unknown data.name 'digits'; did you mean 'digits_lt'\?"),
        (["precision=fp23"], r"unknown precision 'fp23'; did you mean 'fp32'\?"),
        (["data.format=folders"], r"unknown data.format 'folders'; did you mean 'folder'\?"),
        (["train.decay=step"], r"unknown train.decay 'step'; did you mean 'steps'\?"),
        (["train.milestones=[0.5,1]"], "train.milestones=.* must be shares of the epochs"),
        (["train.epochs=five"], "train.epochs: Value 'five'"),
        (["train.epochs=0"], "train.epochs=0 is out of range"),
        (["train.lr=inf"], "train.lr=inf is out of range"),
        (["head.alpha=nan"], "head.alpha=nan is out of range"),
        (["head.gamma=-1"], "head.gamma=-1.0 is out of range"),
        (["train=5"], "train is a section; set one of its keys"),
        (["seeds=[]"], "seeds=.* must be a non-empty list without repeats"),
        (["seeds=[1,1]"], "seeds=.* must be a non-empty list without repeats"),
        (["seeds=[-1]"], r"^seeds=\[-1\] must be in 0 \.\. 4293$"),
        (["seeds=[0,4294]"], r"^seeds=\[0, 4294\] must be in 0 \.\. 4293$"),
        (["seeds=3"], "^seeds: "),
        (["seeds=[0"], "cannot read"),
        (["epochs"], "expected key=value, got 'epochs'"),
        (["=5"], "expected key=value"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config("digits_lt", overrides)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'digit_lt'; did you mean 'digits_lt'\?"):
        load_config("digit_lt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: {epochs: [", "not valid YAML"),
        (b"- 1\n- 2\n", "must be a mapping"),
        (b"trian: {epochs: 1}", "unknown key 'trian.epochs'; did you mean 'train.epochs'"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(str(path))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot read recipe nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_changed_keys_leave_out_what_computes_nothing() -> None:
    old = asdict(load_config("digits_lt"))
    new = asdict(load_config("digits_lt", ["train.lr=0.3", "resume=true", "out=elsewhere", "seeds=[0]"]))
    assert changed_keys(old, new) == ["seeds", "train.lr"]
