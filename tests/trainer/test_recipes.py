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
        (["seeds=[[0]]"], r"^seeds wants a list, such as seeds=\[0,1,2\], got \[\[0\]\]$"),
        (["train.milestones=[[1]]"], r"^train.milestones wants a list, such as train.milestones=\[0.6,0.8\], got "),
        (["methods=[{a: 1}]"], r"^methods wants a list, such as methods=\[linear,cosine,deconfound\], got "),
        (["methods.0=linear"], r"unknown key 'methods.0'; did you mean 'methods'\?"),
        (["methods=[linear]", "methods.a=crt"], "cannot read methods=.* methods.a=crt"),
        (["methods=[linear]", "methods.3=crt"], "cannot read methods=.* methods.3=crt"),
        (["seeds=three"], r"^seeds\[0\]: Value 'three'"),
        (["methods=linear,cosine"], r"unknown method 'linear,cosine'; did you mean"),
        (["seeds=[0"], "cannot read"),
        (["epochs"], "expected key=value, got 'epochs'"),
        (["=5"], "expected key=value"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config("digits_lt", overrides)
    assert "\n" not in str(error.value)


def test_a_single_value_is_a_list_of_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seeds: 4\n")
    config = load_config(str(path), ["methods=linear", "train.milestones=0.5"])
    assert (config.seeds, config.methods, config.train.milestones) == ([4], ["linear"], [0.5])
    assert load_config("digits_lt", ["method=[linear,cosine]"]).methods == ["linear", "cosine"]
    with pytest.raises(UserError, match=r"^head.alphas wants a list, such as head.alphas=\[0.5,1.0,1.5,2.0\], got"):
        load_recipe("shapes_lvis", ["head.alphas=[[1]]"])


@pytest.mark.parametrize(
    ("recipe", "section"), [("digits_lt", {"lists": "~/b"}), ("shapes_lvis", {"annotations": "~/b"})]
)
def test_a_tilde_is_the_users_home(recipe: str, section: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = [f"data.{key}={value}" for key, value in section.items()]
    config = asdict(load_recipe(recipe, ["data.root=~/a", *given, "data.note=~/c", "out=~/d"]))
    assert (config["data"]["root"], config["data"]["note"], config["out"]) == ("/home/me/a", "~/c", "/home/me/d")
    assert [config["data"][key] for key in section] == ["/home/me/b"]
    assert load_config("digits_lt", ["method=crt", "from=~/first"]).stage_one == "/home/me/first"


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'digit_lt'; did you mean 'digits_lt'\?"):
        load_config("digit_lt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: {epochs: [", r"not valid YAML: .* in line \d$"),
        (b"seeds: [1]\ntrain: lr: 1\n", "not valid YAML: mapping values are not allowed .* in line 2$"),
        (b"train: [1]", r"train=\[1\]: train is a section"),
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


def test_changed_keys_leave_out_where_things_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    second = ["method=crt", "from=m"]
    old = asdict(load_config("cifar10_lt", [*second, "data.download=true", "data.root=here"]))
    for first in ("m", "./m", tmp_path / "m"):
        moved = load_config("cifar10_lt", ["method=crt", f"from={first}", "data.root=there", "data.note=a copy"])
        assert changed_keys(old, asdict(moved)) == []
    assert changed_keys(old, asdict(load_config("cifar10_lt", ["method=crt", "from=n"]))) == ["from"]
    assert changed_keys(old, asdict(load_config("cifar10_lt", ["method=linear"]))) == ["from", "methods"]
