"""Runs of detection: their table, their report, and their figures beside the paper's Tables 4, 5, 9 and 10."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tde_trainer import beside, compare
from tde_trainer.errors import UserError
from tde_trainer.kinds import CLASSIFICATION, DETECTION
from tde_trainer.published import numbers, published_table
from tde_trainer.report import write_report
from tde_trainer.table import lift_lines
from trainer_tools import Tde

Accuracy = dict[str, dict[str, float | None] | None]
Run = Callable[..., Path]

METHODS = {"linear", "focal", "eql", "cosine", "capsule", "deconfound"}
DETECTION_TABLES = [4, 5, 9, 10]


@dataclass
class Data:
    name: str = "lvis_v0.5"
    note: str = ""


@dataclass
class Model:
    name: str = "resnet101"


@dataclass
class Train:
    epochs: int = 20


@dataclass
class Settings:
    """What the tables look at in the config of a detection run."""

    task: str = "detection"
    methods: list[str] = field(default_factory=lambda: ["linear", "deconfound"])
    seeds: list[int] = field(default_factory=lambda: [0])
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)


def measured(ap: float, rare: float | None = 0.1) -> dict[str, float | None]:
    return {**dict.fromkeys(DETECTION.measures, ap), "AP_r": rare}


LINEAR: Accuracy = {"without_tde": measured(0.21, None), "with_tde": None, "with_tde_everywhere": None}
DECONFOUND: Accuracy = {
    "without_tde": measured(0.26, 0.1),
    "with_tde": measured(0.295, 0.2),
    "with_tde_everywhere": measured(0.24, 0.15),
}
MEASURED = {"linear": LINEAR, "deconfound": DECONFOUND}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Writes the directory that a detection run would leave."""

    def config_from(values: dict[str, Any]) -> Settings:
        sections = {
            "data": Data(**values["data"]),
            "model": Model(**values["model"]),
            "train": Train(**values["train"]),
        }
        return Settings(**{**values, **sections})

    monkeypatch.setattr(compare, "config_from", config_from)

    def write(name: str, settings: Settings, measured: dict[str, Accuracy]) -> Path:
        config = {**asdict(settings), "methods": list(measured)}
        folder = tmp_path / name
        for method, accuracy in measured.items():
            cell = {
                "method": method,
                "seed": 0,
                "config": config,
                "versions": {"torch": "2", "tde_kernels": "0", "python": "3"},
                "device": "a CPU",
                "class_names": ["cup", "bowl", "ladle"],
                "class_counts": [300, 20, 3],
                "wall_time_s": 1.0,
                "accuracy": {mode: row and {**row, "per_class": 3 * [row["AP"]]} for mode, row in accuracy.items()},
                "alpha": {"value": 1.5, "chosen_by": "the config"} if accuracy["with_tde"] else None,
            }
            (folder / method / "seed0").mkdir(parents=True)
            (folder / method / "seed0/results.json").write_text(json.dumps(cell))
        (folder / "run.json").write_text(json.dumps({"config": config, "command": f"tde train {name}"}))
        return folder

    return write


class TestPublished:
    """The paper's figures."""

    @pytest.mark.parametrize(
        ("number", "settings", "figures"),
        [
            (4, {"data.name": "lvis_v0.5", "method": "focal"}, (21.1, 32.1, 22.6, 3.2, 21.1, 28.3, 22.6)),
            (4, {"data.name": "lvis_v0.5", "method": "eql"}, (24.9, 37.9, 26.7, 10.3, 27.3, 27.8, 27.9)),
            (4, {"data.name": "lvis_v0.5", "method": "capsule + TDE"}, (28.4, 42.1, 30.8, 21.1, 29.7, 29.6, 30.4)),
            (4, {"data.name": "lvis_v1", "method": "deconfound + TDE"}, (27.1, 40.1, 28.7, 16.0, 26.9, 32.1, 30.0)),
            (5, {"method": "deconfound + TDE, background too"}, (23.4, 35.7, 24.9, 13.1, 23.6, 27.1, 24.8)),
            (9, {"model.name": "resnext101_64x4d", "method": "linear"}, (26.4, 39.5, 28.4, 7.4, 28.1, 32.0, 28.5)),
            (10, {"method": "deconfound"}, (20.8, 31.8, 22.1, 7.4, 22.7, 31.2)),
        ],
    )
    def test_a_figure_is_found_by_settings(
        self, number: int, settings: dict[str, Any], figures: tuple[float, ...]
    ) -> None:
        found = published_table(number).figures({"train.epochs": 20, **settings})
        assert found == {"paper": dict(zip(DETECTION.measures, figures, strict=False))}

    @pytest.mark.parametrize("number", DETECTION_TABLES)
    def test_every_row_is_one_that_we_could_have(self, number: int) -> None:
        table = published_table(number)
        names = {method + suffix for method in METHODS for suffix in DETECTION.modes.values()}
        assert table.kind is DETECTION
        for row in table.rows:
            assert row.settings["method"] in names
            assert sum(other.settings == row.settings for other in table.rows) == 1

    def test_ap_is_one_mean_of_rare_common_and_frequent(self) -> None:
        """Weighted by their shares of the classes that the validation set has, whatever the method."""
        rows = [row.figures for number in (4, 5, 9) for row in published_table(number).rows]
        groups, ap = ([[row[name] for name in names] for row in rows] for names in (("AP_r", "AP_c", "AP_f"), ("AP",)))
        shares = np.linalg.lstsq(np.array(groups), np.array(ap), rcond=None)[0]
        assert shares.sum() == pytest.approx(1, abs=0.01)
        np.testing.assert_allclose(groups @ shares, ap, atol=0.15)

    def test_table_9_repeats_rows_of_table_4(self) -> None:
        four, nine = (published_table(number) for number in (4, 9))
        for method in ("linear", "deconfound", "deconfound + TDE"):
            on_v05 = four.figures({"method": method, "data.name": "lvis_v0.5"})
            assert nine.figures({"method": method, "model.name": "resnet101"}) == on_v05

    def test_every_table_of_results_is_there(self) -> None:
        assert numbers() == list(range(2, 11))


class TestSummary:
    """Rows and lift of a detection run."""

    def test_every_mode_has_a_row(self, run: Run) -> None:
        summary = compare.load_summary(run("lvis", Settings(), MEASURED))
        rows = {row["name"]: {name: row[name]["mean"] for name in DETECTION.measures} for row in summary["rows"]}
        assert rows == {
            "linear": LINEAR["without_tde"],
            "deconfound": DECONFOUND["without_tde"],
            "deconfound + TDE": DECONFOUND["with_tde"],
            "deconfound + TDE, background too": DECONFOUND["with_tde_everywhere"],
        }

    def test_the_lift_is_that_of_background_exempted_tde(self, run: Run) -> None:
        summary = compare.load_summary(run("lvis", Settings(), MEASURED))
        assert lift_lines(summary) == ["TDE on deconfound: AP_r +10.0, AP +3.5 points (alpha 1.50)"]

    def test_runs_of_two_tasks_have_no_table(self, run: Run, tiny_run: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="one table holds runs of one task, got classification and detection"):
            write_report([tiny_run, run("lvis", Settings(), MEASURED)], tmp_path / "report.html")

    def test_a_run_without_a_task_is_of_classification(self, tiny_run: Path) -> None:
        assert compare.load_summary(tiny_run)["task"] == CLASSIFICATION.task


class TestByValue:
    """Runs on LVIS at the table's backbone."""

    def test_ours_stand_above_the_papers(self, run: Run) -> None:
        (comparison,) = compare.compare([run("lvis", Settings(), MEASURED)], published_table(4))
        assert comparison.setting == "lvis_v0.5, resnet101, 1 seed; ours from published images, 20 epochs"
        assert beside.caption(comparison) == beside.BY_VALUE
        assert beside.header(comparison) == ["method", "", *DETECTION.measures]
        assert list(map("|".join, beside.lines(comparison))) == [
            "linear|ours|21.0|21.0|21.0|n/a|21.0|21.0|21.0",
            "|paper|22.6 (-1.6)|33.5 (-12.5)|24.4 (-3.4)||23.0 (-2.0)|30.2 (-9.2)|24.3 (-3.3)",
            "deconfound|ours|26.0|26.0|26.0|10.0|26.0|26.0|26.0",
            "|paper|25.7 (+0.3)|38.5 (-12.5)|27.8 (-1.8)|11.4 (-1.4)|26.1 (-0.1)|30.9 (-4.9)|27.7 (-1.7)",
            "deconfound + TDE|ours|29.5|29.5|29.5|20.0|29.5|29.5|29.5",
            "|paper|28.4 (+1.1)|43.0 (-13.5)|30.6 (-1.1)|22.1 (-2.1)|29.0 (+0.5)|30.3 (-0.8)|31.0 (-1.5)",
            "deconfound + TDE, background too|ours|24.0|24.0|24.0|15.0|24.0|24.0|24.0",
        ]

    def test_the_two_versions_of_lvis_stand_apart(self, run: Run) -> None:
        paths = [run(name, Settings(data=Data(name)), MEASURED) for name in ("lvis_v0.5", "lvis_v1")]
        comparisons = compare.compare(paths, published_table(4))
        assert [beside.lines(comparison)[1][2] for comparison in comparisons] == ["22.6 (-1.6)", "21.8 (-0.8)"]

    def test_table_5_has_tde_on_the_background(self, run: Run) -> None:
        (comparison,) = compare.compare([run("lvis", Settings(), {"deconfound": DECONFOUND})], published_table(5))
        ap = {row.settings["method"]: row.published["paper"]["AP"] for row in comparison.rows}
        assert comparison.of_value
        assert ap == {"deconfound": 25.7, "deconfound + TDE": 28.4, "deconfound + TDE, background too": 23.4}

    def test_table_9_goes_by_backbone(self, run: Run) -> None:
        path = run("lvis", Settings(model=Model("resnext101_64x4d")), {"linear": LINEAR})
        (comparison,) = compare.compare([path], published_table(9))
        assert beside.header(comparison)[:2] == ["method", "backbone"]
        assert beside.lines(comparison)[1][3] == "26.4 (-5.4)"

    def test_a_note_says_what_the_images_are(self, run: Run) -> None:
        (comparison,) = compare.compare([run("lvis", Settings(data=Data(note="half")), MEASURED)], published_table(4))
        assert comparison.made_from == "half, 20 epochs"


class TestByOrder:
    """Runs that have no published values."""

    @pytest.mark.parametrize("model", ["resnet101", "small"])
    def test_other_data_stand_beside_the_first_version_of_lvis(self, model: str, run: Run) -> None:
        path = run("shapes", Settings(data=Data("shapes_lvis"), model=Model(model)), MEASURED)
        (comparison,) = compare.compare([path], published_table(4))
        assert beside.caption(comparison) == beside.BY_ORDER
        assert comparison.setting == f"shapes_lvis, {model}, 1 seed; ours from drawn shapes, 20 epochs"
        lines = beside.lines(comparison)
        assert [line[2] for line in lines if line[1] == "paper"] == [
            "22.6 (3, 3)",
            "25.7 (2, 2)",
            "28.4 (1, 1)",
            "1.00",
        ]
        assert lines[-1][0] == "Spearman" and len(lines) == 7  # the row with TDE everywhere is in Table 5 alone

    def test_the_test_server_has_no_run_of_ours(self, run: Run) -> None:
        path = run("lvis", Settings(model=Model("resnext101_64x4d")), MEASURED)
        (comparison,) = compare.compare([path], published_table(10))
        assert not comparison.of_value
        assert beside.header(comparison) == ["method", "", *DETECTION.measures[:-1]]
        assert beside.lines(comparison)[-1][2] == "1.00"


@pytest.mark.parametrize(
    ("number", "settings", "message"),
    [
        (2, Settings(), "is of detection; the table is of classification"),
        (9, Settings(model=Model("small")), "is of small; the table is of resnet101, resnext101_64x4d (model.name)"),
    ],
)
def test_what_can_not_be_compared_is_one_line(
    number: int, settings: Settings, message: str, run: Run, tde: Tde
) -> None:
    result = tde("table", number, run("lvis", settings, MEASURED))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_a_run_of_classification_is_not_in_table_4(tiny_run: Path, tde: Tde) -> None:
    result = tde("table", 4, tiny_run)
    assert result.exit_code == 2 and "is of classification; the table is of detection" in result.stderr


def test_the_commands_print_it(run: Run, tde: Tde, tmp_path: Path) -> None:
    path = run("lvis", Settings(), MEASURED)
    table = tde("table", 4, path)
    assert table.exit_code == 0, table.output
    assert "28.4 (+1.1)" in table.output and "Table 4" in table.output

    report = tde("report", path)
    assert report.exit_code == 0, report.output
    assert "Average precision in %" in report.output and "AP_bbox" in report.output
    page = html.unescape((path / "report.html").read_text())
    assert "<h1>Long-tailed detection report</h1>" in page and "<td>deconfound + TDE, background too</td>" in page
    assert "accuracy" not in page and page.count("<figure>") == 1  # of the two no images are there

    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(compare.load_summary(path)))
    result = tde("page", kept, "--out", tmp_path / "page.md")
    assert result.exit_code == 0, result.output
    markdown = (tmp_path / "page.md").read_text()
    assert "| method | AP | AP50 |" in markdown and "Beside the paper's Table 4" in markdown
    assert "Average precision is in %. AP is of masks" in markdown and "Test accuracy" not in markdown
