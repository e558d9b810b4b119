"""Our figures beside the published ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tde_trainer import results
from tde_trainer.config import config_from
from tde_trainer.published import SOURCES, PublishedTable
from tde_trainer.report import how_made
from tde_trainer.schema import Config
from tde_trainer.table import percent


@dataclass(frozen=True)
class Row:
    """A method in one setting, accuracy in 0 .. 1."""

    data: str
    ratio: float
    method: str
    ours: dict[str, Any]  # see `results.mean_and_spread`
    published: dict[str, float | None]  # in %, by source
    made_from: str

    def difference(self, source: str) -> float | None:
        """Ours less theirs, in points."""
        theirs, ours = self.published[source], self.ours["mean"]
        return None if theirs is None or ours is None else 100 * ours - theirs


def load_summary(path: Path) -> dict[str, Any]:
    """The summary of a run's directory, finished or not, or of a results.json that was kept of one.

    Raises:
        UserError: it is neither.
    """
    if path.is_file():
        return results.with_keys(path, ("rows", "lift", "config", "cells"))
    summary = results.summarize(results.by_method(results.finished_cells(path)))
    return {**summary, **how_made(path)}


def made_from(config: Config) -> str:
    """Which images, and how long: what stands between a figure and the published one."""
    if config.data.format == "torchvision":
        images = "published images"
    else:
        images = config.data.note or "images of an ImageFolder tree"
    size = config.data.image_size
    return f"{images}, {size} x {size}, {config.train.epochs} epochs"


def compare(paths: Sequence[Path], published: PublishedTable) -> list[Row]:
    """Rows in the order of the runs, each beside what was published of it."""
    return [row for path in paths for row in _rows(load_summary(path), published)]


def _rows(summary: dict[str, Any], published: PublishedTable) -> Iterator[Row]:
    config = config_from(summary["config"])
    data, ratio = config.data.name, config.data.ratio
    for row in summary["rows"]:
        figures = published.figures(data, ratio, row["name"])
        yield Row(data, ratio, row["name"], row["overall"], figures, made_from(config))


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """On a terminal."""
    table = Table(title=f"{title}, in %: mean ± sample std over seeds; differences in points")
    for column in ("data", "ratio", "method", "ours", "seeds"):
        table.add_column(column, justify="left" if column in ("data", "method") else "right")
    for source in SOURCES:
        table.add_column(source, justify="right")
        table.add_column("+/-", justify="right")
    table.add_column("ours from")
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[str]:
    """A row's text, in the order of `comparison_table`."""
    compared: list[str] = []
    for source in SOURCES:
        theirs, difference = row.published[source], row.difference(source)
        compared += ["" if theirs is None else f"{theirs:.1f}", "" if difference is None else f"{difference:+.1f}"]
    ours = [percent(row.ours), str(row.ours["n"])]
    return [row.data, f"{row.ratio:g}", row.method, *ours, *compared, row.made_from]
