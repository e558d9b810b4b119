"""Which of our figures stand beside which of the published ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tde_trainer import results
from tde_trainer.config import config_from, flatten
from tde_trainer.errors import UserError
from tde_trainer.kinds import CLASSIFICATION, kind_of
from tde_trainer.published import PublishedTable
from tde_trainer.report import how_made
from tde_trainer.shape import NUMBER
from tde_trainer.table import in_words

_SPREAD = {"mean": NUMBER, "std": NUMBER, "n": int}
_ROW = {"name": str}
IMAGES = {"lvis_v0.5": "published images", "lvis_v1": "published images", "shapes_lvis": "drawn shapes"}


@dataclass(frozen=True)
class Row:
    """A method under some settings."""

    settings: dict[str, Any]  # the config, keys dotted, and ``method``
    ours: dict[str, dict[str, Any]]  # by measure, see `results.mean_and_spread`; in 0 .. 1
    published: dict[str, dict[str, float]]  # by source and measure; in %

    @property
    def images(self) -> str:
        """What stands between a figure and the published one."""
        name, layout, note = (self.settings.get(f"data.{key}") for key in ("name", "format", "note"))
        # Of the list files only those that bear a published name are looked at for being the published ones.
        if layout == "torchvision" and name != "list_lt":
            return "published images"
        return note or IMAGES.get(str(name), "a tree of images, not compared with the published ones")


@dataclass(frozen=True)
class Comparison:
    """Rows of the same images, no two alike, and the table that they stand beside."""

    published: PublishedTable
    rows: list[Row]

    @property
    def of_value(self) -> bool:
        """Whether ours are of the published table's data and backbone. Of others only the order compares."""
        return self.published.of_value(self.rows[0].settings)

    @property
    def place(self) -> tuple[Any, ...]:
        """What the rows have in common."""
        first = self.rows[0]
        keys = ("data.name", "data.ratio", "data.image_size", *self.published.where)
        return (first.images, *(first.settings.get(key) for key in keys))

    @property
    def labels(self) -> set[tuple[str, ...]]:
        """What tells the rows apart."""
        return {self.published.label(row.settings) for row in self.rows}

    @property
    def setting(self) -> str:
        """For people."""
        first = self.rows[0].settings
        ratio = f", ratio {first['data.ratio']:g}" if "data.ratio" in self.published.keys else ""
        backbone = f", {first['model.name']}" if "model.name" in self.published.where else ""
        seeds = _either(row.ours[self.published.kind.headline]["n"] for row in self.rows)
        plural = "" if seeds == "1" else "s"
        return f"{first['data.name']}{ratio}{backbone}, {seeds} seed{plural}; ours from {self.made_from}"

    @property
    def made_from(self) -> str:
        """Our images, and how long they were trained on."""
        size = self.rows[0].settings.get("data.image_size")  # detection keeps the images' own
        epochs = _either(row.settings["train.epochs"] for row in self.rows)
        return f"{self.rows[0].images}, {f'{size} x {size}, ' if size else ''}{epochs} epochs"


def load_summary(path: Path) -> dict[str, Any]:
    """The summary of a run's directory, finished or not, or of a results.json that was kept of one.

    Raises:
        UserError: it is neither.
    """
    if path.is_file():
        summary = results.read_as(path, {"rows": [_ROW], "lift": dict, "config": dict, "cells": int})
        return results.read_as(path, {"rows": [dict.fromkeys(kind_of(summary).measures, _SPREAD)]})
    summary = results.summarize(results.by_method(results.finished_cells(path)))
    return {**summary, **how_made(path)}


def load_grid(path: Path) -> dict[str, Any]:
    """The summary of a grid's directory, or its grid.json.

    Raises:
        UserError: it is neither.
    """
    file = path / results.GRID if path.is_dir() else path
    row = {**_ROW, "settings": dict, **dict.fromkeys(CLASSIFICATION.measures, _SPREAD)}
    return results.read_as(file, {"alphas": [NUMBER], "rows": [row], "config": dict})


def rows_of(summary: dict[str, Any], published: PublishedTable) -> list[Row]:
    """The rows of a summary; those of a grid have settings of their own."""
    config = flatten(asdict(config_from(summary["config"])))
    settings = [{**config, **row.get("settings", {}), "method": row["name"]} for row in summary["rows"]]
    return [
        Row(own, {measure: row[measure] for measure in kind_of(summary).measures}, published.figures(own))
        for own, row in zip(settings, summary["rows"], strict=True)
    ]


def compare(paths: Sequence[Path], published: PublishedTable) -> list[Comparison]:
    """Rows of several runs in one table where they are of the same images, in the order of the runs.

    Two runs with a row alike, such as trainings of other length, stand in two tables.

    Raises:
        UserError: the table has no row of a run, or is of another task.
    """
    load = {"test": load_summary, "val": load_grid}[published.split]
    tables: list[Comparison] = []
    for path in paths:
        summary = load(path)
        if (kind := kind_of(summary)) is not published.kind:
            raise UserError(f"{path} is of {kind.task}; the table is of {published.kind.task}")
        rows = rows_of(summary, published)
        if not any(row.published for row in rows):
            raise _not_in_table(path, rows, published)
        for new in _by_place(rows, published):
            fitting = (table for table in tables if table.place == new.place and not table.labels & new.labels)
            table = next(fitting, None)
            if table is None:
                tables.append(new)
            else:
                table.rows.extend(new.rows)
    return tables


def _by_place(rows: Sequence[Row], published: PublishedTable) -> Iterable[Comparison]:
    found: dict[tuple[Any, ...], Comparison] = {}
    for row in rows:
        alone = Comparison(published, [row])
        if row.published or alone.of_value:  # an order is that of rows that both have
            found.setdefault(alone.place, Comparison(published, [])).rows.append(row)
    return found.values()


def _not_in_table(path: Path, rows: Sequence[Row], published: PublishedTable) -> UserError:
    for key in published.keys:
        ours = dict.fromkeys(row.settings[key] for row in rows)
        theirs = dict.fromkeys(row.settings[key] for row in published.rows if key in row.settings)
        if not ours.keys() & theirs.keys():
            given, wanted = (", ".join(map(in_words, values)) for values in (ours, theirs))
            return UserError(f"{path} is of {given}; the table is of {wanted} ({key})")
    return UserError(f"{path} holds no row of the table, which tells rows apart by {', '.join(published.keys)}")


def _either(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(values))))
