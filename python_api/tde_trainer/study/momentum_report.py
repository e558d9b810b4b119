"""What the momentum study gives: momentum.json, its figures and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tde_trainer.files import dumps, write_atomic
from tde_trainer.markdown import render
from tde_trainer.metrics import GROUPS
from tde_trainer.report import how_made
from tde_trainer.results import mean_and_spread
from tde_trainer.study.momentum import Trained, draw_all, mean_accuracy
from tde_trainer.table import percent

CAPTIONS = {
    "feature_norm": "Mean norm of the test images' features per class (Figure 1b of the paper).",
    "relative_change": "Accuracy against momentum, without TDE, relative to the largest momentum (Figure 1c).",
    "alpha": "Test accuracy against alpha, exact at every alpha, first seed (Figure 4).",
    "weight_norm": "Norm of the class weights per class (Figure 6).",
}


def summarize(trained: Sequence[Trained], command: str, *, fixed_lr: bool) -> dict[str, Any]:
    """All that momentum.json holds: the accuracies by momentum and method, and how they were made."""
    rows = [
        {
            "mu": one.mu,
            "lr": cells[0]["config"]["train"]["lr"],
            "method": method,
            **{group: mean_accuracy(one, method, group) for group in GROUPS},
            "lift": mean_and_spread([_lift(cell) for cell in cells]),
        }
        for one in trained
        for method, cells in one.groups.items()
    ]
    made = [how_made(one.run) for one in trained]
    seconds = sum(one["wall_time_s"] for one in made)
    cells = sum(one["cells"] for one in made)
    whole = {"command": command, "fixed_lr": fixed_lr, "wall_time_s": seconds, "cells": cells}
    return {"rows": rows, **made[0], **whole}


def _lift(cell: dict[str, Any]) -> float | None:
    accuracy = cell["accuracy"]
    if accuracy["with_tde"] is None:
        return None
    return float(accuracy["with_tde"]["overall"] - accuracy["without_tde"]["overall"])


def momentum_table(summary: dict[str, Any]) -> Table:
    """For the terminal."""
    table = Table(title="Test accuracy in % without TDE, and what TDE adds overall")
    for column in ("method", "momentum", *GROUPS, "TDE"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in summary["rows"]:
        lift = percent(row["lift"], signed=True)
        table.add_row(row["method"], f"{row['mu']:g}", *(percent(row[group]) for group in GROUPS), lift)
    return table


def write(
    trained: Sequence[Trained], at: float, command: str, out: Path, page: Path | None, *, fixed_lr: bool
) -> dict[str, Any]:
    """Write page, figures and momentum.json into ``out``; with ``page`` that too, the others in folders beside it."""
    summary = summarize(trained, command, fixed_lr=fixed_lr)
    images = draw_all(trained, at)
    places = [(out / "page.md", out, out)]
    if page is not None:
        places.append((page, page.parent / "images", page.parent / "results"))
    for path, pictures, data in places:
        shown = []
        for name, caption in CAPTIONS.items():
            if name in images:
                picture = pictures / f"momentum_{name}.png"
                write_atomic(picture, images[name])
                shown.append((caption, picture.relative_to(path.parent).as_posix()))
        values = data / "momentum.json"
        write_atomic(values, dumps(summary, indent=1) + "\n")
        link = values.relative_to(path.parent).as_posix()
        write_atomic(path, render("momentum.md.j2", **summary, groups=GROUPS, images=shown, data=link))
    return summary
