"""Published figures, as data: one YAML file for each table of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml  # type: ignore[import-untyped]

from tde_trainer.errors import UserError
from tde_trainer.kinds import KINDS, Kind
from tde_trainer.table import in_words


@dataclass(frozen=True)
class PublishedRow:
    """Figures in %, and the settings under which they were found."""

    source: str  # the paper, or where else its authors published it
    settings: dict[str, Any]  # keys of the config, dotted, and ``method``, a row's name in our own tables
    figures: dict[str, float]  # by measure


@dataclass(frozen=True)
class PublishedTable:
    """A table of the paper."""

    kind: Kind  # of the runs that it can stand beside
    title: str
    split: str  # "test", or "val" of a grid
    where: dict[str, Any]  # settings of the whole table; what was found under others compares by order alone
    elsewhere: dict[str, Any]  # settings whose rows stand beside a run that has none of the table's, by order alone
    keys: list[str]  # settings that tell its rows apart
    groups: list[str]  # the measures that it gives
    rows: list[PublishedRow]

    @property
    def label_keys(self) -> list[str]:
        """Settings that tell rows on the same data apart."""
        return [key for key in self.keys if not key.startswith("data.")]

    @property
    def sources(self) -> list[str]:
        """In the order in which they first come."""
        return list(dict.fromkeys(row.source for row in self.rows))

    def label(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """The settings under `label_keys`, in words."""
        return tuple(in_words(settings[key]) for key in self.label_keys)

    def figures(self, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Figures by source and measure, of the rows whose settings are among these."""
        settings = {**settings, **self._instead(settings)}
        return {row.source: row.figures for row in self.rows if row.settings.items() <= settings.items()}

    def of_value(self, settings: Mapping[str, Any]) -> bool:
        """Whether figures found under these settings compare with the table's by more than their order."""
        return self.where.items() <= settings.items() and not self._instead(settings)

    def _instead(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        known = {key: [row.settings.get(key) for row in self.rows] for key in self.elsewhere}
        return {key: value for key, value in self.elsewhere.items() if settings[key] not in known[key]}


def numbers() -> list[int]:
    """Of the tables that there are."""
    names = (entry.name for entry in files(__name__).iterdir())
    return sorted(int(name.removeprefix("table").removesuffix(".yaml")) for name in names if name.endswith(".yaml"))


def published_table(number: int) -> PublishedTable:
    """The figures of that table.

    Raises:
        UserError: there are none.
    """
    if number not in numbers():
        raise UserError(f"no published figures of table {number}; known: {', '.join(map(str, numbers()))}")
    content: dict[str, Any] = yaml.safe_load((files(__name__) / f"table{number}.yaml").read_text(encoding="utf-8"))
    columns = content["columns"]
    kind = next(kind for kind in KINDS.values() if kind.headline in columns)
    groups = [column for column in columns if column in kind.measures]
    keys = [column for column in columns if column not in (*kind.measures, "source")]
    return PublishedTable(
        kind=kind,
        title=content["title"],
        split=content["split"],
        where=content.get("where", {}),
        elsewhere=content.get("elsewhere", {}),
        keys=keys,
        groups=groups,
        rows=[_row(dict(zip(columns, row, strict=True)), keys, groups) for row in content["rows"]],
    )


def _row(values: dict[str, Any], keys: list[str], groups: list[str]) -> PublishedRow:
    settings = {key: values[key] for key in keys if values[key] is not None}
    return PublishedRow(values.get("source", "paper"), settings, {group: values[group] for group in groups})
