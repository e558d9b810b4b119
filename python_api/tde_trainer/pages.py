"""The page of results: each summary that was kept of a run, with its figures, its table and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tde_trainer import beside
from tde_trainer.compare import Comparison, load_summary, rows_of
from tde_trainer.errors import UserError
from tde_trainer.figures import FIGURES
from tde_trainer.files import write_atomic
from tde_trainer.kinds import kind_of
from tde_trainer.markdown import render
from tde_trainer.published import published_table
from tde_trainer.table import lift_lines


def write_results_page(files: Sequence[Path], page: Path) -> None:
    """Write ``page``, a section for each results.json.

    Beside ``NAME.json`` may lie ``NAME.md``, what is to be said of it; figures are ``images/NAME_FIGURE.png`` beside
    the page.

    Raises:
        UserError: a file is no results.json of a run.
    """
    entries = [_entry(file, page.parent) for file in files]
    kinds = {entry["kind"].task: entry["kind"] for entry in entries}.values()
    write_atomic(page, render("results.md.j2", entries=entries, kinds=kinds, beside=beside))


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    summary, remark = load_summary(file), file.with_suffix(".md")
    kind = kind_of(summary)
    captions = FIGURES[kind.task].captions
    images = {f"images/{file.stem}_{figure}.png": caption for figure, caption in captions.items()}
    return {
        **summary,
        "kind": kind,
        "name": file.stem,
        "remark": remark.read_text(encoding="utf-8").strip() if remark.exists() else "",
        "lifts": lift_lines(summary),
        "images": {image: caption for image, caption in images.items() if (folder / image).exists()},
        "compared": _compared(summary),
        "link": f"results/{file.name}",
    }


def _compared(summary: dict[str, Any]) -> Comparison | None:
    """The rows that stand in the first table of the paper that has such."""
    for published in map(published_table, kind_of(summary).tables):
        compared = Comparison(published, [row for row in rows_of(summary, published) if row.published])
        if len(compared.rows) > 1 or (compared.rows and compared.of_value):  # one row has no order
            return compared
    return None
