"""Our figures beside the published ones, and the page of results."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tde_trainer.compare import compare, load_summary
from tde_trainer.errors import UserError
from tde_trainer.published import published_table
from trainer_tools import Tde


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


def test_table_3_is_the_papers() -> None:
    table = published_table(3)
    assert table.figures("cifar10_lt", 100, "deconfound + TDE") == {"paper": 80.4, "from scratch": 80.6}
    assert table.figures("cifar100_lt", 10, "bbn") == {"paper": 59.1, "from scratch": None}
    assert table.figures("cifar10_lt", 20, "bbn") == {"paper": None, "from scratch": None}
    for tables in table.sources.values():
        assert all(len(row) == len(table.ratios) for rows in tables.values() for row in rows.values())


def test_a_row_is_set_beside_the_papers(cifar: Path) -> None:
    linear, plain, tde = compare([cifar], published_table(3))
    assert [linear.beside(source) for source in ("paper", "from scratch")] == ["", ""]
    assert [plain.beside(source) for source in ("paper", "from scratch")] == ["72.5 (+0.5)", "71.7 (+1.3)"]
    assert [tde.beside(source) for source in ("paper", "from scratch")] == ["80.4 (+0.6)", "80.6 (+0.4)"]
    assert tde.setting == "cifar10_lt, ratio 100, 2 seeds; ours from JPEG copies, 32 x 32, 2 epochs"


def test_the_command_prints_it(cifar: Path, tde: Tde) -> None:
    result = tde("table", 3, cifar)
    assert result.exit_code == 0, result.output
    assert "80.4 (+0.6)" in result.output and "JPEG copies" in result.output


@pytest.mark.parametrize(
    ("number", "run", "message"),
    [
        (1, "cifar", "no published figures of table 1; known: 3"),
        (3, "tiny", "is of digits_lt; the table is of cifar100_lt, cifar10_lt"),
        (3, "nowhere", "no run at"),
        (3, "foreign", "was not written by a run"),
    ],
)
def test_what_can_not_be_compared_is_one_line(
    number: int, run: str, message: str, cifar: Path, tiny_run: Path, tmp_path: Path, tde: Tde
) -> None:
    (tmp_path / "foreign.json").write_text("[]")
    paths = {"cifar": cifar, "tiny": tiny_run, "nowhere": tmp_path / "nowhere", "foreign": tmp_path / "foreign.json"}
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
        assert "per_class.png" not in first and "published figures" not in first
        assert "| deconfound + TDE | 81.0 ± 1.0 | 80.4 (+0.6) | 80.6 (+0.4) |" in second
        assert "(results/cifar10_lt.json)" in second

    def test_its_tables_have_no_holes(self, cifar: Path, tmp_path: Path, tde: Tde) -> None:
        assert tde("page", cifar, "--out", tmp_path / "page.md").exit_code == 0
        lines = (tmp_path / "page.md").read_text().splitlines()
        for above, line in pairwise(lines):
            if line.startswith("|"):
                assert above == "" or above.count("|") == line.count("|")
        assert sum(line.startswith("|---") for line in lines) == 2

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        from tde_trainer.pages import write_results_page

        with pytest.raises(UserError, match="no such file"):
            write_results_page([tmp_path / "none.json"], tmp_path / "page.md")
