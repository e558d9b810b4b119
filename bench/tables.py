"""Tables of results: for each work and dtype the rivals as rows, the shapes as columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import rich.table

from bench.results import Row
from bench.shapes import SHAPES
from bench.works import WORKS

LABELS = {
    "bare": "products alone, `torch.mm`",
    "bare_by_library": "products alone, by the library that the CPU backend takes",
    "mean": "`x.mean(0)` alone",
    "plain": "plain inference",
    "inference": "one TDE inference",
    "by_inference": "by TDE inferences of tde_kernels",
    "reference": "tde_kernels' reference in plain torch",
    "eager": "eager torch, as the paper's code",
    "compiled_eager": "`torch.compile` of the paper's code",
    "compiled_reference": "`torch.compile` of the reference",
    "autotuned_eager": "`torch.compile` of the paper's code, max-autotune",
    "autotuned_reference": "`torch.compile` of the reference, max-autotune",
    "logits_first": "tde_kernels' logits, then torch's loss",
    "torch_linear": "`F.linear_cross_entropy` ¹",
    "torch_chunked": "`F.linear_cross_entropy` in four chunks ¹",
    "cut_cross_entropy": "Cut Cross-Entropy ¹",
    "liger": "Liger ¹",
    "torchvision": "torchvision's `FastRCNNPredictor`, its class scores alone ²",
    "by_class": "eager torch, two softmaxes and a loop over the classes",
}


class Table(NamedTuple):
    """Cells as text; the first row is the head."""

    title: str
    rows: list[list[str]]


def label(rival: str) -> str:
    """A rival's name for people."""
    return LABELS.get(rival, f"**{rival}**" if rival.startswith("tde_kernels") else rival)


def _name(rival: str, rows: Sequence[Row]) -> str:
    limits = {row.info.get("limit") for row in rows}
    return f"{label(rival)} (the limit)" if rival in limits else label(rival)


def best_of_ours(rows: Sequence[Row]) -> Row | None:
    """The fastest backend of this package in a group."""
    return min((row for row in rows if row.ours), key=lambda row: row.ratio, default=None)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return "-"
    details = [milliseconds(row.seconds)]
    if ours is not None and not row.ours:
        details.insert(0, f"{row.ratio / ours.ratio:.2f}x ours")
    if "peak_mib" in row.info:
        details.append(f"{row.info['peak_mib']:.0f} MiB")
    return f"{row.ratio:.2f} ({', '.join(details)})"


def of(rows: Sequence[Row]) -> list[Table]:
    """A table for each work and dtype that there are rows of, shapes that stand for users' alone."""
    found = []
    for work, what in WORKS.items():
        for dtype in dict.fromkeys(row.dtype for row in rows if row.work == work):
            those = [row for row in rows if (row.work, row.dtype) == (work, dtype) and row.shape in SHAPES]
            shapes = [name for name in SHAPES if any(row.shape == name for row in those)]
            cells = {(row.rival, row.shape): row for row in those}
            ours = {shape: best_of_ours([row for row in those if row.shape == shape]) for shape in shapes}
            body = [
                [_name(rival, those), *(_cell(cells.get((rival, shape)), ours[shape]) for shape in shapes)]
                for rival in dict.fromkeys(row.rival for row in those)
            ]
            if body:
                found.append(Table(f"{what.title}; {dtype}", [["", *shapes], *body]))
    return found


def markdown(table: Table) -> list[str]:
    """Its lines, under a heading."""
    head, *body = table.rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return [f"### {table.title}", "", *("| " + " | ".join(cells) + " |" for cells in lines), ""]


def rich_table(table: Table) -> rich.table.Table:
    """For a terminal."""
    head, *body = table.rows
    shown = rich.table.Table(title=table.title, title_justify="left")
    for position, name in enumerate(head):
        shown.add_column(name, justify="right" if position else "left")
    for cells in body:
        shown.add_row(*cells)
    return shown
