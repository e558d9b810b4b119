"""Our figures beside the published ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from tde_trainer import results
from tde_trainer.config import config_from
from tde_trainer.errors import UserError
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

    @property
    def setting(self) -> str:
        """For people."""
        seeds = f"{self.ours['n']} seed{'s' if self.ours['n'] != 1 else ''}"
        return f"{self.data}, ratio {self.ratio:g}, {seeds}; ours from {self.made_from}"

    def beside(self, source: str) -> str:
        """Their figure and, in brackets, ours less theirs in points; empty where they give none."""
        theirs, ours = self.published[source], self.ours["mean"]
        return "" if theirs is None or ours is None else f"{theirs:.1f} ({100 * ours - theirs:+.1f})"


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
        images = config.data.note or "a tree of images, not compared with the published ones"
    size = config.data.image_size
    return f"{images}, {size} x {size}, {config.train.epochs} epochs"


def compare(paths: Sequence[Path], published: PublishedTable) -> list[Row]:
    """Rows in the order of the runs, each beside what was published of it.

    Raises:
        UserError: a run is of data that the table has no figures of.
    """
    summaries = {path: load_summary(path) for path in paths}
    for path, summary in summaries.items():
        data = summary["config"]["data"]["name"]
        if data not in published.data():
            raise UserError(f"{path} is of {data}; the table is of {', '.join(published.data())}")
    return [row for summary in summaries.values() for row in rows_of(summary, published)]


def rows_of(summary: dict[str, Any], published: PublishedTable) -> list[Row]:
    """The rows of one run's summary."""
    config = config_from(summary["config"])
    data, ratio = config.data.name, config.data.ratio
    return [
        Row(data, ratio, row["name"], row["overall"], published.figures(data, ratio, row["name"]), made_from(config))
        for row in summary["rows"]
    ]


def comparison_tables(rows: Sequence[Row]) -> Iterator[tuple[str, Table]]:
    """For a terminal: each setting in words, and its table."""
    for setting, members in groupby(rows, lambda row: row.setting):
        table = Table()
        table.add_column("method")
        for column in ("ours", *SOURCES):
            table.add_column(column, justify="right")
        for row in members:
            table.add_row(row.method, percent(row.ours), *map(row.beside, SOURCES))
        yield setting, table
