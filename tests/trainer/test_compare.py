"""Our figures beside the published ones, and the page of results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tde_trainer import beside
from tde_trainer.compare import compare, load_summary
from tde_trainer.config import flatten
from tde_trainer.data import DATASETS
from tde_trainer.data.digits_lt import digits_lt
from tde_trainer.errors import UserError
from tde_trainer.methods import METHODS
from tde_trainer.metrics import GROUPS
from tde_trainer.models import MODELS
from tde_trainer.published import published_table
from tde_trainer.schema import Config
from trainer_tools import Tde

Kept = Callable[[str, dict[str, dict[str, Any]], dict[str, Sequence[float | None]]], Path]

RESNEXT = {"data": {"name": "imagenet_lt"}, "model": {"name": "resnext50_32x4d"}}
TREE = {"data": {"name": "folder_lt", "format": "folder", "note": "small photographs"}, "model": {"name": "resnet10"}}

ROWS = {  # in the paper overall 51.8, 45.0, 49.9, 48.6, and nothing of mixup
    "deconfound + TDE": (0.30, 0.2, None, 0.31),
    "linear": (0.50, 0.2, None, 0.30),
    "mixup": (0.90, 0.9, None, 0.90),
    "lws": (0.40, 0.2, None, 0.35),
    "deconfound": (0.45, 0.2, None, 0.29),
}


@pytest.fixture
def cifar(tiny_run: Path, tmp_path: Path) -> Path:
    """A summary as a run on CIFAR-10-LT would leave it."""
    summary: dict[str, Any] = json.loads((tiny_run / "results.json").read_text())
    summary["config"]["data"] |= {"name": "cifar10_lt", "ratio": 100.0, "format": "folder", "note": "JPEG copies"}
    for row, mean in zip(summary["rows"], (0.7, 0.73, 0.81), strict=True):
        row["overall"] = {"mean": mean, "std": 0.01, "n": 2}
    path = tmp_path / "results/cifar10_lt.json"
    path.parent.mkdir()
    path.write_text(json.dumps(summary))
    return path


@pytest.fixture
def kept(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Writes a results.json as a run would leave it, of other settings and figures."""
    monkeypatch.setitem(DATASETS, "imagenet_lt", digits_lt)

    def keep(name: str, settings: dict[str, dict[str, Any]], rows: dict[str, Sequence[float | None]]) -> Path:
        summary: dict[str, Any] = json.loads((tiny_run / "results.json").read_text())
        for section, changes in settings.items():
            summary["config"][section] |= changes
        summary["rows"] = [
            {"name": row, **{group: {"mean": x, "std": None, "n": 1} for group, x in zip(GROUPS, figures, strict=True)}}
            for row, figures in rows.items()
        ]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(summary))
        return path

    return keep


class TestPublished:
    """The paper's figures."""

    @pytest.mark.parametrize(
        ("number", "settings", "overall"),
        [
            (2, {"method": "tau_norm"}, 49.4),
            (3, {"data.name": "cifar10_lt", "data.ratio": 100.0, "method": "deconfound + TDE"}, 80.4),
            (3, {"data.name": "cifar100_lt", "data.ratio": 10.0, "method": "bbn"}, 59.1),
            (6, {"head.num_heads": 2, "head.tau": 8.0, "head.gamma": 1 / 32, "method": "deconfound"}, 42.0),
            (7, {"head.num_heads": 1, "method": "capsule + TDE"}, 50.6),
            (8, {"model.name": "resnext101_32x4d", "method": "deconfound"}, 50.0),
        ],
    )
    def test_a_figure_is_found_by_settings(self, number: int, settings: dict[str, Any], overall: float) -> None:
        found = published_table(number).figures({**settings, "train.epochs": 90, "seeds": [0]})
        assert found["paper"]["overall"] == overall

    def test_what_they_do_not_give_is_not_found(self) -> None:
        cifar = {"data.name": "cifar10_lt", "data.ratio": 100.0}
        table = published_table(3)
        assert table.figures({**cifar, "method": "deconfound + TDE"})["from scratch"] == {"overall": 80.6}
        assert table.figures({**cifar, "method": "bbn"}).keys() == {"paper"}
        assert table.figures({**cifar, "data.ratio": 20.0, "method": "bbn"}) == {}

    @pytest.mark.parametrize(("alpha", "few"), [(2.5, 29.4), (3.0, 32.6), (3.5, 36.0)])
    def test_table_6_goes_by_alpha_with_tde_alone(self, alpha: float, few: float) -> None:
        settings = {"head.num_heads": 2, "head.tau": 16.0, "head.gamma": 1 / 32, "head.alpha": alpha}
        table = published_table(6)
        assert table.figures({**settings, "method": "deconfound"})["paper"]["overall"] == 49.8
        assert table.figures({**settings, "method": "deconfound + TDE"})["paper"]["few"] == few

    @pytest.mark.parametrize("number", [2, 3, 6, 7, 8])
    def test_every_row_is_one_that_we_could_have(self, number: int) -> None:
        table = published_table(number)
        names = {"method": METHODS, "model.name": MODELS}
        for row in table.rows:
            settings = {**table.where, **row.settings}
            assert settings.keys() <= {"method", *flatten(asdict(Config()))}
            for key in settings.keys() & names.keys():
                assert settings[key].removesuffix(" + TDE") in names[key]
            assert sum(row.source == other.source and other.settings == row.settings for other in table.rows) == 1

    @pytest.mark.parametrize("number", [2, 6, 7, 8])
    def test_overall_is_the_mean_over_imagenets_classes(self, number: int) -> None:
        """Of which 385 have more than 100 training images and 136 fewer than 20."""
        for row in published_table(number).rows:
            many, medium, few, overall = (row.figures[group] for group in GROUPS)
            assert (385 * many + 479 * medium + 136 * few) / 1000 == pytest.approx(overall, abs=0.15), row


class TestByValue:
    """Runs on the data that the table is of."""

    def test_a_row_is_set_beside_the_papers(self, cifar: Path) -> None:
        (comparison,) = compare([cifar], published_table(3))
        assert comparison.setting == "cifar10_lt, ratio 100, 2 seeds; ours from JPEG copies, 32 x 32, 2 epochs"
        assert beside.header(comparison) == ["method", "ours", "paper", "from scratch"]
        assert beside.lines(comparison) == [
            ["linear", "70.0 ± 1.0", "", ""],
            ["deconfound", "73.0 ± 1.0", "72.5 (+0.5)", "71.7 (+1.3)"],
            ["deconfound + TDE", "81.0 ± 1.0", "80.4 (+0.6)", "80.6 (+0.4)"],
        ]

    def test_of_several_groups_the_paper_has_a_line_of_its_own(self, kept: Kept) -> None:
        run = kept("run", RESNEXT, {"lws": (0.6, 0.48, None, 0.5), "mixup": (0.5, 0.4, 0.3, 0.4)})
        (comparison,) = compare([run], published_table(2))
        assert comparison.setting.startswith("imagenet_lt, resnext50_32x4d, 1 seed; ours from published images")
        assert beside.header(comparison) == ["method", "", *GROUPS]
        assert beside.lines(comparison) == [
            ["lws", "ours", "60.0", "48.0", "n/a", "50.0"],
            ["", "paper", "60.2 (-0.2)", "47.2 (+0.8)", "", "49.9 (+0.1)"],
            ["mixup", "ours", "50.0", "40.0", "30.0", "40.0"],
        ]

    def test_any_lists_are_not_taken_for_the_published_ones(self, kept: Kept) -> None:
        run = kept("run", {**RESNEXT, "data": {"name": "list_lt"}}, {"lws": (0.6, 0.5, None, 0.5)})
        (comparison,) = compare([run], published_table(2))
        assert "ours from a tree of images, not compared" in comparison.setting and not comparison.of_value

    def test_rows_go_by_the_tables_own_settings(self, kept: Kept) -> None:
        rows = {"cosine": (0.7, 0.4, 0.1, 0.5), "cosine + TDE": (0.6, 0.5, 0.3, 0.5)}
        one, two, four = (kept(f"{k}", {**RESNEXT, "head": {"num_heads": k}}, rows) for k in (1, 2, 4))
        (comparison,) = compare([one, two], published_table(7))
        overall = {tuple(line[:3]): line[-1] for line in beside.lines(comparison) if line[2] == "ours"}
        assert overall.keys() == {(row, k, "ours") for row in rows for k in "12"}
        assert [line[-1] for line in beside.lines(comparison) if line[2] == "paper"] == [
            "47.6 (+2.4)", "50.5 (-0.5)", "48.1 (+1.9)", "51.1 (-1.1)"
        ]  # fmt: skip
        with pytest.raises(UserError, match=r"is of 4; the table is of 1, 2 \(head.num_heads\)"):
            compare([four], published_table(7))

    def test_runs_of_two_stages_stand_in_one_table(self, kept: Kept) -> None:
        first = kept("first", RESNEXT, {"linear": (0.7, 0.4, 0.1, 0.5)})
        second = kept("second", {**RESNEXT, "train": {"epochs": 1}}, {"crt": (0.6, 0.5, 0.3, 0.5)})
        (comparison,) = compare([first, second], published_table(2))
        assert comparison.labels == {("linear",), ("crt",)} and comparison.setting.endswith("1 or 2 epochs")

    def test_the_same_row_twice_stands_in_two_tables(self, kept: Kept) -> None:
        rows = {"linear": (0.7, 0.4, 0.1, 0.5)}
        paths = [kept("short", RESNEXT, rows), kept("long", {**RESNEXT, "train": {"epochs": 9}}, rows)]
        comparisons = compare(paths, published_table(2))
        assert [c.setting.rpartition(", ")[2] for c in comparisons] == ["2 epochs", "9 epochs"]

    @pytest.mark.parametrize(
        "other", [{"data": {**RESNEXT["data"], "image_size": 64}}, {"model": {"name": "resnet50"}}]
    )
    def test_rows_of_other_images_or_networks_stand_apart(self, other: dict[str, Any], kept: Kept) -> None:
        one = kept("one", RESNEXT, {"linear": (0.7, 0.4, 0.1, 0.5)})
        two = kept("two", {**RESNEXT, **other}, {"crt": (0.6, 0.5, 0.3, 0.5)})
        assert [len(comparison.rows) for comparison in compare([one, two], published_table(2))] == [1, 1]


class TestByOrder:
    """Runs on other data."""

    def test_ranks_stand_for_differences(self, kept: Kept) -> None:
        (comparison,) = compare([kept("tree", TREE, ROWS)], published_table(2))
        assert "order, not of value" in beside.caption(comparison)
        assert comparison.setting.startswith("folder_lt, resnet10, 1 seed; ours from small photographs")
        assert beside.lines(comparison) == [
            ["deconfound + TDE", "ours", "30.0", "20.0", "n/a", "31.0"],
            ["", "paper", "62.7 (3, 4)", "48.8 (1, 1)", "", "51.8 (1, 2)"],
            ["linear", "ours", "50.0", "20.0", "n/a", "30.0"],
            ["", "paper", "66.1 (2, 1)", "38.4 (4, 1)", "", "45.0 (4, 3)"],
            ["lws", "ours", "40.0", "20.0", "n/a", "35.0"],
            ["", "paper", "60.2 (4, 3)", "47.2 (2, 1)", "", "49.9 (2, 1)"],
            ["deconfound", "ours", "45.0", "20.0", "n/a", "29.0"],
            ["", "paper", "67.9 (1, 2)", "42.7 (3, 1)", "", "48.6 (3, 4)"],
            # 1 - 6 * sum of squared differences / (n^3 - n): all ranks differ by one; there are none; by one again
            ["Spearman", "paper", "0.60", "n/a", "", "0.60"],
        ]

    def test_the_papers_data_at_another_backbone_are_no_values_either(self, kept: Kept) -> None:
        run = kept("run", {**RESNEXT, "model": {"name": "resnet50"}}, ROWS)
        (comparison,) = compare([run], published_table(2))
        assert not comparison.of_value and all(row.published for row in comparison.rows)

    def test_the_command_says_so(self, kept: Kept, tde: Tde) -> None:
        result = tde("table", 2, kept("tree", TREE, ROWS))
        assert result.exit_code == 0, result.output
        assert "order, not of value" in " ".join(result.output.split()) and "Spearman" in result.output


def test_the_command_prints_it(cifar: Path, tde: Tde) -> None:
    result = tde("table", 3, cifar)
    assert result.exit_code == 0, result.output
    assert "80.4 (+0.6)" in result.output and "JPEG copies" in result.output


@pytest.mark.parametrize(
    ("number", "run", "message"),
    [
        (1, "cifar", "no published figures of table 1; known: 2, 3, 4, 5, 6, 7, 8, 9, 10"),
        (3, "tiny", "is of digits_lt; the table is of cifar100_lt, cifar10_lt"),
        (8, "tiny", "is of small_conv; the table is of resnext50_32x4d, resnext101_32x4d (model.name)"),
        (2, "mixup", "is of mixup; the table is of focal, oltr"),
        (3, "nowhere", "no run at"),
        (3, "foreign", "was not written by a run"),
        (6, "nowhere", "no such file"),
        (6, "tiny", "no such file"),
        (6, "cifar", "was not written by a run: it lacks alphas"),
    ],
)
def test_what_can_not_be_compared_is_one_line(
    number: int, run: str, message: str, cifar: Path, tiny_run: Path, tmp_path: Path, tde: Tde, kept: Kept
) -> None:
    (tmp_path / "foreign.json").write_text("[]")
    paths = {"cifar": cifar, "tiny": tiny_run, "nowhere": tmp_path / "nowhere", "foreign": tmp_path / "foreign.json"}
    paths["mixup"] = kept("mixup", TREE, {"mixup": (0.9, 0.9, 0.9, 0.9)})
    result = tde("table", number, paths[run])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_a_run_in_progress_is_summarized_from_its_cells(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "results.json").unlink()
    shutil.rmtree(run / "deconfound")
    assert [row["name"] for row in load_summary(run)["rows"]] == ["linear"]


class TestPage:
    """``tde page``."""

    def test_it_has_a_section_for_each_file(self, cifar: Path, tiny_run: Path, tmp_path: Path, tde: Tde) -> None:
        shutil.copy(tiny_run / "results.json", tmp_path / "results/tiny.json")
        (tmp_path / "results/tiny.md").write_text("Digits, for a moment.\n")
        (tmp_path / "images").mkdir()
        (tmp_path / "images/tiny_alpha.png").write_bytes(b"")
        page = tmp_path / "page.md"
        result = tde("page", tmp_path / "results/tiny.json", cifar, "--out", page)
        assert result.exit_code == 0, result.output
        first, second = page.read_text().split("## ")[1:]
        assert first.startswith("tiny\n") and "Digits, for a moment." in first and "images/tiny_alpha.png" in first
        assert "per_class.png" not in first and "Table 3" not in first
        assert "paper's Table 2" in first and "order, not of value" in first and "| Spearman | paper |" in first
        assert "paper's Table 3" in second and "Table 2" not in second
        assert "| deconfound + TDE | 81.0 ± 1.0 | 80.4 (+0.6) | 80.6 (+0.4) |" in second
        assert "(results/cifar10_lt.json)" in second

    def test_its_tables_have_no_holes(self, cifar: Path, tiny_run: Path, tmp_path: Path, tde: Tde) -> None:
        shutil.copy(tiny_run / "results.json", tmp_path / "results/tiny.json")
        assert tde("page", cifar, tmp_path / "results/tiny.json", "--out", tmp_path / "page.md").exit_code == 0
        lines = (tmp_path / "page.md").read_text().splitlines()
        for above, line in pairwise(lines):
            if line.startswith("|"):
                assert above == "" or above.count("|") == line.count("|")
        assert sum(line.startswith("|---") for line in lines) == 4

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        from tde_trainer.pages import write_results_page

        with pytest.raises(UserError, match="no such file"):
            write_results_page([tmp_path / "none.json"], tmp_path / "page.md")
