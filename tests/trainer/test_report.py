"""The report: one file that needs no other."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from pathlib import Path

import pytest
from tde_trainer.plots import CAPTIONS
from tde_trainer.results import mean_and_spread
from tde_trainer.table import counts_in_words, percent
from trainer_tools import Tde


def test_it_refers_to_nothing_outside_itself(tiny_run: Path) -> None:
    page = (tiny_run / "report.html").read_text()
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) == len(CAPTIONS)
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG")
    assert not re.search(r"https?://|@import|<script|<link|url\(", page)


def test_it_shows_the_table_and_how_it_was_made(tiny_run: Path) -> None:
    page = html.unescape((tiny_run / "report.html").read_text())
    summary = json.loads((tiny_run / "results.json").read_text())
    for row in summary["rows"]:
        assert f"<td>{row['name']}</td><td>{percent(row['many'])}</td>" in page
    assert summary["command"] in page and f"torch {summary['versions']['torch']}" in page
    assert summary["device"] in page and '"batch_size": 64' in page
    assert f"{', '.join(map(str, summary['class_counts']))}: 10 classes, {sum(summary['class_counts'])} images" in (
        " ".join(page.split())
    )


def test_plots_lie_beside_it(tiny_run: Path) -> None:
    assert {path.stem for path in (tiny_run / "plots").glob("*.png")} == set(CAPTIONS)


def test_what_the_user_wrote_is_escaped(tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    shutil.copytree(tiny_run, run)
    assert tde("report", run).exit_code == 0
    page = (run / "report.html").read_text()
    assert "&lt;b&gt;run" in page and "<b>run" not in page


def test_several_runs_side_by_side(tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    result = tde("report", tiny_run, other, "--out", tmp_path / "both/report.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "both/report.html").read_text()
    for name in ("tiny: linear", "other: linear", "tiny: deconfound + TDE", "other: deconfound + TDE"):
        assert f"<td>{name}</td>" in page


def test_runs_of_one_name_are_told_apart_by_their_paths(tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
    other, page = tmp_path / "p" / tiny_run.name, tmp_path / "both/report.html"
    shutil.copytree(tiny_run, other)
    assert tde("report", tiny_run, other, "--out", page).exit_code == 0
    for run in (tiny_run, other):
        assert f"<td>{run}: linear</td>" in page.read_text()


def test_a_run_that_is_given_twice_is_refused(tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_run)
    result = tde("report", tiny_run, tmp_path / "link", "--out", tmp_path / "both/report.html")
    assert result.exit_code == 2 and f"{tmp_path / 'link'} is given twice" in result.stderr


def test_a_report_of_one_cell_leaves_its_results_alone(tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
    cell = tmp_path / "cell"
    shutil.copytree(tiny_run / "linear/seed0", cell)
    before = (cell / "results.json").read_bytes()
    assert tde("report", cell).exit_code == 0
    assert (cell / "results.json").read_bytes() == before
    assert {path.stem for path in (cell / "plots").glob("*.png")} == {"feature_norm", "weight_norm"}


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.5, 0.7], "60.0 ± 14.1"), ([0.5], "50.0"), ([None, float("nan")], "n/a"), ([None, 0.25], "25.0")],
)
def test_mean_and_sample_standard_deviation(values: list[float | None], text: str) -> None:
    assert percent(mean_and_spread(values)) == text


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([9, 1, 4], "9, 1, 4: 3 classes, 14 images"),
        ([60] * 20, f"{', '.join(['60'] * 20)}: 20 classes, 1,200 images"),
        ([5, 400, *[10] * 17, 500, 6], "500, 400, 10, ..., 6, 5: 21 classes, 1,081 images"),
    ],
)
def test_of_many_classes_the_largest_and_the_smallest_are_listed(counts: list[int], text: str) -> None:
    assert counts_in_words(counts) == text
