"""The tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from tde_trainer.kinds import kind_of

SHOWN_CLASSES = 20  # of more, only the largest and the smallest are listed


def percent(entry: dict[str, Any], signed: bool = False) -> str:
    """Mean and spread of accuracies in percent, ``"71.3 ± 2.0"``; ``"n/a"`` where there is none."""
    if entry["mean"] is None:
        return "n/a"
    mean = f"{100 * entry['mean']:{'+' if signed else ''}.1f}"
    return mean if entry["std"] is None else f"{mean} ± {100 * entry['std']:.1f}"


def dense(title: str | None, settings: Sequence[str], figures: Sequence[str]) -> Table:
    """An empty table of many columns, those of settings to the left and never broken."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in settings:
        table.add_column(name, no_wrap=True)
    for name in figures:
        table.add_column(name, overflow="fold", justify="right")
    return table


def heading(key: str) -> str:
    """What a key of the config is called above a column."""
    return {"head.num_heads": "K", "model.name": "backbone"}.get(key, key.removeprefix("head."))


def in_words(value: Any) -> str:
    """The value of a setting; empty where there is none."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def counts_in_words(counts: Sequence[int]) -> str:
    """Images per class, ``"9, 4, 1: 3 classes, 14 images"``, or of many classes the largest and the smallest."""
    shown = [str(count) for count in counts]
    if len(counts) > SHOWN_CLASSES:
        ordered = sorted(counts, reverse=True)
        shown = [*map(str, ordered[:3]), "...", *map(str, ordered[-2:])]
    return f"{', '.join(shown)}: {len(counts)} classes, {sum(counts):,} images"


def accuracy_table(summary: dict[str, Any]) -> Table:
    """Method by measure, as in Tables 2 and 4 of the paper."""
    kind = kind_of(summary)
    seeds = max(row[kind.headline]["n"] for row in summary["rows"])
    table = Table(title=f"{kind.title} in %, mean ± sample std over {seeds} seed{'s' if seeds > 1 else ''}")
    table.add_column("method")
    for measure in kind.measures:
        table.add_column(measure, justify="right")
    for row in summary["rows"]:
        table.add_row(row["name"], *(percent(row[measure]) for measure in kind.measures))
    return table


def lift_lines(summary: dict[str, Any]) -> list[str]:
    """One sentence per method with TDE."""
    kind, lines = kind_of(summary), []
    for name, lift in summary["lift"].items():
        tail = lift[kind.tail]
        shown = "" if tail["mean"] is None else f"{kind.tail_in_words} {percent(tail, signed=True)}, "
        shown += f"{kind.headline} {percent(lift[kind.headline], signed=True)} points"
        lines.append(f"TDE on {name}: {shown} (alpha {lift['alpha']['mean']:.2f})")
    return lines


def alpha_table(name: str, curve: dict[str, Any]) -> Table:
    """Every measure at every alpha, before them the one of validation images, where there are any, that chooses."""
    kind = kind_of(curve)
    columns = {f"val {kind.headline}": curve["val"][kind.headline]} if "val" in curve else {}
    columns |= {measure: curve["test"][measure] for measure in kind.measures}
    table = Table(title=f"{name}: {kind.title.lower()} in % against alpha")
    for column in ("alpha", *columns):
        table.add_column(column, justify="right")
    for index, alpha in enumerate(curve["alphas"]):
        table.add_row(f"{alpha:g}", *(percent(points[index]) for points in columns.values()))
    return table
