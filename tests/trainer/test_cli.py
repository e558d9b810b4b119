"""The commands, end to end on a tiny run."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tde_trainer import checkpoint
from tde_trainer.metrics import GROUPS
from tde_trainer.recipe import recipe_names
from trainer_tools import TINY, Tde


def read(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON


def test_a_cell_writes_down_everything(tiny_run: Path) -> None:
    cell = read(tiny_run / "deconfound/seed1/results.json")
    assert (cell["method"], cell["seed"], cell["epochs"]) == ("deconfound", 1, 2)
    assert cell["config"]["train"]["epochs"] == 2 and cell["config"]["data"]["ratio"] == 50
    assert {"python", "torch", "tde_kernels", "accelerate"} <= cell["versions"].keys()
    assert cell["wall_time_s"] > 0 and cell["device"]
    assert cell["alpha"]["chosen_by"] == "mean_per_class accuracy on the validation split"
    assert len(cell["class_counts"]) == len(cell["feature_norm"]) == len(cell["weight_norm"]) == 10
    for mode in ("with_tde", "without_tde"):
        accuracy = cell["accuracy"][mode]
        assert accuracy.keys() == {*GROUPS, "per_class"} and len(accuracy["per_class"]) == 10
        assert math.isclose(accuracy["overall"], sum(accuracy["per_class"]) / 10)
    for split in ("val", "test"):
        assert {group: len(curve) for group, curve in cell["sweep"][split].items()} == dict.fromkeys(GROUPS, 7)
    assert cell["sweep"]["test"]["overall"][0] == pytest.approx(cell["accuracy"]["without_tde"]["overall"])
    at_alpha = cell["sweep"]["alphas"].index(round(cell["alpha"]["value"], 6))
    assert cell["sweep"]["test"]["few"][at_alpha] == pytest.approx(cell["accuracy"]["with_tde"]["few"])


def test_the_baseline_has_no_tde(tiny_run: Path) -> None:
    cell = read(tiny_run / "linear/seed0/results.json")
    assert cell["alpha"] is None and cell["sweep"] is None and cell["accuracy"]["with_tde"] is None


def test_metrics_have_a_line_per_epoch(tiny_run: Path) -> None:
    lines = (tiny_run / "linear/seed0/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"] and all(row["images_per_second"] > 0 for row in rows)


def test_the_summary_is_the_mean_over_seeds(tiny_run: Path) -> None:
    summary = read(tiny_run / "results.json")
    assert [row["name"] for row in summary["rows"]] == ["linear", "deconfound", "deconfound + TDE"]
    few = [read(tiny_run / f"deconfound/seed{s}/results.json")["accuracy"] for s in (0, 1)]
    lifts = [a["with_tde"]["few"] - a["without_tde"]["few"] for a in few]
    lift = summary["lift"]["deconfound"]["few"]
    assert lift["n"] == 2 and lift["mean"] == pytest.approx(sum(lifts) / 2)
    assert lift["std"] == pytest.approx(abs(lifts[0] - lifts[1]) / math.sqrt(2))
    assert summary["command"].startswith("tde train digits_lt train.epochs=2")


def test_training_says_what_it_does(tmp_path: Path, tde: Tde) -> None:
    result = tde("train", "digits_lt", *TINY, "methods=[cosine]", "seeds=[0]", f"out={tmp_path / 'run'}")
    assert result.exit_code == 0
    assert "training images per class: 129, 83, 54, 35, 22, 14, 9, 6, 3, 2: 10 classes, 357 images" in result.output
    assert "cosine + TDE" in result.output and "TDE on cosine: few-shot" in result.output
    assert f"report: {tmp_path / 'run' / 'report.html'}" in result.output.replace("\n", "")
    assert "\x1b" not in result.output and len(result.output.splitlines()) < 15  # quiet, as this is no terminal


def test_eval_repeats_the_accuracy_of_the_run(tiny_run: Path, tde: Tde) -> None:
    table = next(row for row in read(tiny_run / "results.json")["rows"] if row["name"] == "deconfound + TDE")
    result = tde("eval", tiny_run)
    row = next(line for line in result.output.splitlines() if "deconfound + TDE" in line)
    assert result.exit_code == 0 and f"{100 * table['overall']['mean']:.1f}" in row


def test_eval_takes_another_alpha_and_a_single_cell(tiny_run: Path, tde: Tde) -> None:
    cell = tiny_run / "deconfound/seed0"
    sweep = read(cell / "results.json")["sweep"]
    last = f"{100 * sweep['test']['overall'][-1]:.1f}"
    result = tde("eval", cell, f"alpha={sweep['alphas'][-1]}")
    row = next(line for line in result.output.splitlines() if "deconfound + TDE" in line)
    assert result.exit_code == 0 and row.split("│")[-2].strip() == last


def test_sweep_writes_the_curve(tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    result = tde("sweep", run, "--max", "1", "--steps", "3")
    assert result.exit_code == 0, result.output
    curve = read(run / "sweep.json")["deconfound"]
    assert curve["alphas"] == [0.0, 0.5, 1.0] and len(curve["val"]["few"]) == 3
    plain = next(row for row in read(run / "results.json")["rows"] if row["name"] == "deconfound")
    assert curve["test"]["overall"][0]["mean"] == pytest.approx(plain["overall"]["mean"])


def test_recipes_and_info(tde: Tde) -> None:
    lines = tde("recipes").output.splitlines()
    assert [line.partition(": ")[0] for line in lines] == recipe_names()
    assert all(line.partition(": ")[2] for line in lines)
    assert "tde_kernels" in tde("info").output


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["grid"],
        ["gradcam"],
        ["eval"],
        ["sweep"],
        ["report"],
        ["table"],
        ["page"],
        ["ap"],
        ["recipes"],
        ["info"],
    ],
)
def test_help_has_a_sentence(command: list[str], tde: Tde) -> None:
    result = tde(*command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "digit_lt"], "did you mean 'digits_lt'"),
        (["train", "digits_lt", "train.epoch=3"], "did you mean 'train.epochs'"),
        (["train", "digits_lt", "head.num_heads=3"], "head of method 'cosine'"),
        (["train", "digits_lt", "data.test_per_class=170"], "at least one training image"),
        (["train", "cifar10_lt"], "no intact copy of CIFAR10 in data/cifar-10-batches-py; data.download=true"),
        (["train", "tiny_imagenet_lt", "data.root=."], "there is no folder train; wanted are images as"),
        (["train", "digits_lt", "train.batch_size=313"], "leaves 1 of 314 training images for an epoch's last batch"),
        (["eval", "nowhere"], "no run at nowhere"),
        (["eval", "RUN/linear"], "RUN/linear is the folder of a method; wanted is its run, RUN, or one training, RUN/"),
        (["sweep", "nowhere"], "no run at nowhere"),
        (["report", "nowhere"], "no run at nowhere"),
        (["eval", "RUN", "alpha=nan"], "alpha=nan must be finite"),
        (["eval", "RUN", "alpha=big"], "alpha='big' is not a number"),
        (["eval", "RUN", "beta=1"], "expected alpha=VALUE"),
        (["sweep", "RUN", "--steps", "1"], "--steps 1 at least 2"),
        (["sweep", "RUN/linear/seed0"], "holds no method with TDE"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(
    command: list[str], message: str, tiny_run: Path, tde: Tde, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = tde(*(part.replace("RUN", str(tiny_run)) for part in command))
    assert result.exit_code == 2 and message.replace("RUN", str(tiny_run)) in result.output
    assert result.output.startswith("error: ") and len(result.output.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing half written


def test_a_damaged_run_is_one_line(tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
    cell = tmp_path / "cell"
    shutil.copytree(tiny_run / "deconfound/seed0", cell)
    (cell / checkpoint.FILE).write_bytes((cell / checkpoint.FILE).read_bytes()[:1000])
    result = tde("eval", cell)
    assert result.exit_code == 2 and "is corrupt" in result.output and len(result.output.splitlines()) == 1
    (cell / "results.json").write_text("{}")
    assert "was not written by a run" in tde("eval", cell).output
    (cell / "results.json").unlink()
    assert "holds no finished training" in tde("eval", cell).output


def test_a_diverging_training_is_said_so(tde: Tde, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = tde("train", "digits_lt", *TINY, "methods=[linear]", "seeds=[0]", "train.lr=1e30", f"out={run}")
    assert result.exit_code == 2 and "a lower train.lr may help" in result.output


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("typer", []), ("accelerate", ["train", "digits_lt"]), ("torchvision", ["train", "digits_lt"])],
)
def test_a_missing_package_names_the_extra(package: str, arguments: list[str]) -> None:
    """Whether the command line itself wants it or a command."""
    code = f"import sys; sys.modules[{package!r}] = None; from tde_trainer.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f'error: {package} is missing; pip install "tde_kernels[train]"\n'


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from tde_trainer.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    for arguments in (["--help"], ["recipes"], ["train", "--help"], ["study", "momentum", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
