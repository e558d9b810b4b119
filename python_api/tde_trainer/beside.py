"""A comparison as text: ours and theirs, with the difference, or with the ranks where order alone compares."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from tde_trainer.compare import Comparison
from tde_trainer.table import dense, heading, percent

BY_VALUE = "in brackets ours less theirs in points"
BY_ORDER = (
    "on other data or another backbone, so a comparison of order, not of value: in brackets the ranks, theirs and "
    "ours, among the rows that both have"
)


def caption(comparison: Comparison) -> str:
    """What the brackets hold."""
    return BY_VALUE if comparison.of_value else BY_ORDER


def header(comparison: Comparison) -> list[str]:
    """What stands above the cells of `lines`; the first are names of the settings in ``published.label_keys``."""
    published = comparison.published
    names = [heading(key) for key in published.label_keys]
    return [*names, "ours", *published.sources] if _one_group(comparison) else [*names, "", *published.groups]


def lines(comparison: Comparison) -> list[list[str]]:
    """A line for each row and a column for each source, or, of several groups of classes, a column for each group and a
    line for each source. Where order alone compares, Spearman's correlation of the ranks comes last.
    """
    published = comparison.published
    labels = [published.label(row.settings) for row in comparison.rows]
    if not comparison.of_value:
        labels.append(("Spearman", *[""] * (len(published.label_keys) - 1)))
    by_group = {"ours": [_ours(comparison, group) for group in published.groups]}
    by_group |= {
        source: [_theirs(comparison, source, group) for group in published.groups] for source in published.sources
    }
    found = []
    for label, *cells in zip(labels, *(zip(*columns, strict=True) for columns in by_group.values()), strict=True):
        if _one_group(comparison):
            found.append([*label, *(cell for (cell,) in cells)])
            continue
        for who, groups in zip(by_group, cells, strict=True):
            if any(groups):
                found.append([*label, who, *groups])
                label = [""] * len(label)
    return found


def table(comparison: Comparison) -> Table:
    """For a terminal."""
    names, columns = len(comparison.published.label_keys), header(comparison)
    shown = dense(None, columns[:names], columns[names:])
    for cells in lines(comparison):
        shown.add_row(*cells)
    return shown


def _one_group(comparison: Comparison) -> bool:
    return len(comparison.published.groups) == 1


def _ours(comparison: Comparison, group: str) -> list[str]:
    figures = [percent(row.ours[group]) for row in comparison.rows]
    return figures if comparison.of_value else [*figures, ""]


def _theirs(comparison: Comparison, source: str, group: str) -> list[str]:
    known: dict[int, tuple[float, float]] = {}  # ours and theirs, by row
    for index, row in enumerate(comparison.rows):
        mine, other = row.ours[group]["mean"], row.published.get(source, {}).get(group)
        if mine is not None and other is not None:
            known[index] = mine, other
    ours, theirs = ([pair[side] for pair in known.values()] for side in (0, 1))
    if comparison.of_value:
        brackets = [f"{100 * mine - other:+.1f}" for mine, other in known.values()]
    else:
        brackets = [f"{other}, {mine}" for mine, other in zip(_ranks(ours), _ranks(theirs), strict=True)]
    cells = [""] * len(comparison.rows)
    for index, other, bracket in zip(known, theirs, brackets, strict=True):
        cells[index] = f"{other:.1f} ({bracket})"
    return cells if comparison.of_value else [*cells, _correlation(ours, theirs)]


def _ranks(figures: Sequence[float]) -> list[int]:
    """From 1, the best; equal figures share the better rank."""
    from scipy.stats import rankdata  # takes seconds: only for whom it serves

    return [int(rank) for rank in rankdata([-figure for figure in figures], method="min")]


def _correlation(ours: Sequence[float], theirs: Sequence[float]) -> str:
    if not ours:
        return ""
    if min(len(set(ours)), len(set(theirs))) < 2:
        return "n/a"  # all alike: there is no order
    from scipy.stats import spearmanr

    return f"{round(spearmanr(ours, theirs).statistic, 2) + 0.0:.2f}"  # no -0.00
