"""A grid of runs, compared on validation data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tde_trainer import grid
from tde_trainer.data import DATASETS
from tde_trainer.data.digits_lt import digits_lt
from tde_trainer.errors import UserError
from tde_trainer.grid import plan
from tde_trainer.metrics import GROUPS
from tde_trainer.restore import validate_run
from trainer_tools import TINY, Tde

AXES = ["head.num_heads=1,2", "head.tau=8,16"]
COMMAND = ["grid", "digits_lt", *TINY, "train.epochs=1", "seeds=[0]", *AXES, "head.alpha=0.5,1.5"]
RUNS = [f"head.num_heads={k},head.tau={tau}" for k in (1, 2) for tau in (8, 16)]


def read(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tde: Tde) -> tuple[Path, str]:
    """A grid of four runs, and what was printed."""
    out = tmp_path_factory.mktemp("grids") / "grid"
    result = tde(*COMMAND, f"out={out}")
    assert result.exit_code == 0, result.output
    return out, result.output


class TestPlan:
    """Which runs a grid is of."""

    def test_the_papers_changes_one_setting_at_a_time(self) -> None:
        planned = plan("cifar100_lt", [])
        heads = [(run.head.num_heads, run.head.tau, run.head.gamma) for run in planned.runs.values()]
        assert sorted(heads) == sorted(
            [
                (2, 16, 1 / 32),
                (1, 16, 1 / 32),
                (4, 16, 1 / 32),
                (2, 8, 1 / 32),
                (2, 32, 1 / 32),
                (2, 16, 1 / 16),
                (2, 16, 1 / 64),
            ]
        )
        assert planned.alphas == [2.5, 3.0, 3.5] and planned.config.methods == ["deconfound"]
        assert planned.runs["head.num_heads=2,head.tau=8,head.gamma=0.03125"].out == (
            "runs/cifar100_lt_grid/head.num_heads=2,head.tau=8,head.gamma=0.03125"
        )

    def test_axes_are_combined(self) -> None:
        planned = plan("digits_lt", [*AXES, "train.lr=0.1", "out=here", "head.alpha=1"])
        assert list(planned.runs) == RUNS and planned.axes == ["head.num_heads", "head.tau"]
        for name, run in planned.runs.items():
            assert f"head.num_heads={run.head.num_heads},head.tau={run.head.tau:g}" == name
            assert (run.train.lr, run.out, run.head.alpha) == (0.1, f"here/{name}", None)
        assert planned.alphas == [1.0]

    def test_a_list_is_a_value(self) -> None:
        planned = plan("digits_lt", ["seeds=[3,4]", "methods=[linear,cosine]", "train.lr=0.1,0.2", "train.lr=0.3, 0.4"])
        assert list(planned.runs) == ["train.lr=0.3", "train.lr=0.4"]  # the last word counts, as everywhere
        assert all(run.seeds == [3, 4] and run.methods == ["linear", "cosine"] for run in planned.runs.values())

    def test_the_values_of_an_axis_may_stand_for_lists(self) -> None:
        planned = plan("digits_lt", ["methods=linear,deconfound", "train.milestones=0.5"])
        assert planned.axes == ["methods"]
        assert [run.methods for run in planned.runs.values()] == [["linear"], ["deconfound"]]

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["head.tau=8,"], "head.tau=8,: the values of an axis must be without repeats, and none empty"),
            (["head.tau=8,16,8"], "head.tau=8,16,8: the values of an axis must be without repeats"),
            (["out=a,b"], "out can be no axis"),
            (["resume=true,false"], "resume can be no axis"),
            (["head.taus=8,16"], "unknown key 'head.taus'; did you mean 'head.tau'"),
            (["head.tau=8,-1"], "head.tau=-1.0 is out of range"),
            (["head.tau=8,hot"], "head.tau: Value 'hot'"),
            (["head.alpha=1,big"], "head.alpha: Value 'big'"),
            (["head.alpha=-1"], "head.alpha=-1.0 is out of range"),
            (["head.alpha=null"], "head.alpha=null: wanted are the alphas at which to read every network"),
            (["methods=deconfound,cosines"], "unknown method 'cosines'; did you mean 'cosine'?"),
            (["head.tau"], "expected key=value, got 'head.tau'"),
        ],
    )
    def test_what_makes_no_grid_is_named(self, overrides: list[str], message: str) -> None:
        with pytest.raises(UserError) as error:
            plan("digits_lt", overrides)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_every_combination_is_a_run_of_its_own(trained: tuple[Path, str]) -> None:
    out, printed = trained
    assert sorted(path.name for path in out.iterdir()) == sorted([*RUNS, "grid.json"])
    for name in RUNS:
        cell = read(out / name / "deconfound/seed0/results.json")
        assert f"head.num_heads={cell['config']['head']['num_heads']}" in name and cell["epochs"] == 1
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name}: validation deconfound ")]
        assert "deconfound + TDE at 0.5 " in line and "deconfound + TDE at 1.5 " in line


def test_rows_hold_the_validation_accuracy_at_every_alpha(trained: tuple[Path, str]) -> None:
    """Which each training left in its own sweep, at alphas of which these are some."""
    out, _ = trained
    rows = read(out / "grid.json")["rows"]
    assert len(rows) == 4 * 3
    for row in rows:
        cell = read(out / row["run"] / "deconfound/seed0/results.json")
        alpha = row["settings"]["head.alpha"]
        assert row["name"] == ("deconfound" if alpha is None else "deconfound + TDE")
        assert {k: row["settings"][f"head.{k}"] for k in ("num_heads", "tau")} == {
            k: cell["config"]["head"][k] for k in ("num_heads", "tau")
        }
        at = cell["sweep"]["alphas"].index(alpha or 0.0)
        for group in GROUPS:
            assert row[group]["mean"] == pytest.approx(cell["sweep"]["val"][group][at])


def test_the_best_on_validation_data_comes_first_and_is_marked(trained: tuple[Path, str]) -> None:
    out, printed = trained
    rows = read(out / "grid.json")["rows"]
    overall = [row["overall"]["mean"] for row in rows]
    assert overall == sorted(overall, reverse=True) and overall[0] > overall[-1]
    (best,) = [line for line in printed.splitlines() if line.endswith("best ")]
    settings = rows[0]["settings"]
    assert best.split()[:2] == [str(settings["head.num_heads"]), f"{settings['head.tau']:g}"]
    assert f"{100 * overall[0]:.1f}" in best


def test_it_says_how_it_was_made(trained: tuple[Path, str]) -> None:
    summary = read(trained[0] / "grid.json")
    assert (
        summary["command"].startswith("tde grid digits_lt") and summary["cells"] == 4 and summary["versions"]["torch"]
    )
    assert (summary["axes"], summary["alphas"]) == (["head.num_heads", "head.tau"], [0.5, 1.5])
    assert summary["config"]["train"]["epochs"] == 1 and summary["wall_time_s"] > 0


def test_finished_trainings_are_skipped(trained: tuple[Path, str], tmp_path: Path, tde: Tde) -> None:
    out = tmp_path / "grid"
    shutil.copytree(trained[0], out)
    result = tde(*COMMAND, f"out={out}")
    assert result.exit_code == 2 and "is not empty: resume=true" in result.output
    lost = out / RUNS[2] / "deconfound/seed0"
    shutil.rmtree(lost)
    kept = {name: (out / name / "deconfound/seed0/results.json").stat().st_mtime_ns for name in RUNS if name != RUNS[2]}
    before = read(out / "grid.json")["rows"]
    result = tde(*COMMAND, f"out={out}", "resume=true")
    assert result.exit_code == 0, result.output
    assert result.output.count("already finished") == 3 and (lost / "results.json").exists()
    for name, time in kept.items():
        assert (out / name / "deconfound/seed0/results.json").stat().st_mtime_ns == time
    assert read(out / "grid.json")["rows"] == before


def test_seeds_are_averaged_and_linear_is_read_without_tde(tiny_run: Path) -> None:
    rows = validate_run(tiny_run, [1.0])
    assert [(row["name"], row["settings"]["head.alpha"]) for row in rows] == [
        ("linear", None),
        ("deconfound", None),
        ("deconfound + TDE", 1.0),
    ]
    sweeps = [read(tiny_run / f"deconfound/seed{seed}/results.json")["sweep"] for seed in (0, 1)]
    few = [sweep["val"]["few"][sweep["alphas"].index(1.0)] for sweep in sweeps]
    assert rows[2]["few"]["mean"] == pytest.approx(sum(few) / 2) and rows[2]["few"]["n"] == 2


def test_a_corner_that_can_not_be_built_is_told_before_any_is_trained(tmp_path: Path, tde: Tde) -> None:
    result = tde("grid", "digits_lt", *TINY, "head.num_heads=2,3", f"out={tmp_path / 'grid'}")
    assert result.exit_code == 2 and "head of method 'deconfound'" in result.output
    assert not list(tmp_path.iterdir())


def test_an_interruption_says_how_to_go_on(tmp_path: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "train_run", interrupted)
    result = tde(*COMMAND, f"out={tmp_path / 'grid'}")
    assert result.exit_code == 130 and "resume=true" in result.output


class TestTable6:
    """A grid beside the paper's."""

    def test_on_other_data_by_order(self, trained: tuple[Path, str], tde: Tde) -> None:
        result = tde("table", 6, trained[0])
        assert result.exit_code == 0, result.output
        assert "order, not of value" in " ".join(result.output.split()) and "validation split" in result.output
        # Of the paper's rows it has those of K = 1 and 2 at tau 16 and of K = 2 at tau 8, at none of its alphas.
        rows = [line.split()[:4] for line in result.output.splitlines() if line.strip().startswith("deconfound")]
        assert sorted(rows) == [["deconfound", k, tau, "0.03125"] for k, tau in (("1", "16"), ("2", "16"), ("2", "8"))]

    def test_on_the_papers_data_by_value(
        self, trained: tuple[Path, str], tmp_path: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(DATASETS, "imagenet_lt", digits_lt)
        summary = read(trained[0] / "grid.json")
        summary["config"]["data"]["name"], summary["config"]["model"]["name"] = "imagenet_lt", "resnext50_32x4d"
        for row in summary["rows"]:
            row["overall"] = {"mean": 0.5, "std": None, "n": 1}
            if row["settings"]["head.alpha"] == 0.5:
                row["settings"]["head.alpha"] = 2.5
        (tmp_path / "grid.json").write_text(json.dumps(summary))
        result = tde("table", 6, tmp_path / "grid.json")
        assert result.exit_code == 0, result.output
        shown = " ".join(result.output.split())
        for difference in ("49.4 (+0.6)", "49.8 (+0.2)", "42.0 (+8.0)", "53.3 (-3.3)"):
            assert difference in shown
        assert "52.9" not in shown  # alpha 3.5
