"""Published figures, as data: one YAML file for each table of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml  # type: ignore[import-untyped]

from tde_trainer.errors import UserError

SOURCES = ("paper", "from scratch")


@dataclass(frozen=True)
class PublishedTable:
    """Accuracies in % by source, data set, row and imbalance ratio."""

    title: str
    ratios: list[float]
    sources: dict[str, dict[str, dict[str, list[float]]]]

    def data(self) -> list[str]:
        """Names of the data sets that it is about."""
        return sorted({name for tables in self.sources.values() for name in tables})

    def figures(self, data: str, ratio: float, row: str) -> dict[str, float | None]:
        """By source; None where a source has none."""
        column = self.ratios.index(ratio) if ratio in self.ratios else None
        found: dict[str, float | None] = {}
        for source, tables in self.sources.items():
            values = tables.get(data, {}).get(row)
            found[source] = None if values is None or column is None else values[column]
        return found


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
    return PublishedTable(content["title"], content["ratios"], {source: content[source] for source in SOURCES})
