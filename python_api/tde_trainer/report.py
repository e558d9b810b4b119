"""report.html: one file with the table, the plots and how the run was made."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from tde_trainer import results, table
from tde_trainer.errors import UserError
from tde_trainer.figures import FIGURES
from tde_trainer.files import write_atomic
from tde_trainer.kinds import kind_of
from tde_trainer.results import Result


def collect(runs: Sequence[Path]) -> dict[str, list[Result]]:
    """Finished cells by method; with several runs, by run and method.

    Raises:
        UserError: a run is given twice; see `results.finished_cells`.
    """
    resolved, names = [run.resolve() for run in runs], [run.name for run in runs]
    groups: dict[str, list[Result]] = {}
    for place, run in enumerate(runs):
        if resolved[place] in resolved[:place]:
            raise UserError(f"{run} is given twice; wanted are different runs")
        label = run.name if names.count(run.name) == 1 else str(run)
        for cell in results.finished_cells(run):
            groups.setdefault(f"{label}: {cell.method}" if len(runs) > 1 else cell.method, []).append(cell)
    return groups


def write_report(runs: Sequence[Path], path: Path) -> dict[str, Any]:
    """Write ``path``, and its plots into ``plots/`` beside it.

    Returns:
        The summary, see `results.summarize`.
    """
    groups = collect(runs)
    summary = results.summarize({name: [cell.values for cell in cells] for name, cells in groups.items()})
    made = [how_made(run) for run in runs]
    kind = kind_of(summary)
    figures = FIGURES[kind.task]
    images, left_out = figures.draw(groups)
    for name, png in images.items():
        write_atomic(path.parent / "plots" / f"{name}.png", png)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tde_trainer"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        kind=kind,
        rows=summary["rows"],
        lifts=table.lift_lines(summary),
        percent=table.percent,
        counts_in_words=table.counts_in_words,
        plots=[(figures.captions[name], base64.b64encode(png).decode()) for name, png in images.items()],
        left_out=left_out,
        runs=made,
    )
    write_atomic(path, page)
    return summary


def how_made(run: Path) -> dict[str, Any]:
    """How a run was made; the parts that its cells share."""
    cells = [result.values for result in results.finished_cells(run)]
    return {
        "run": str(run),
        "command": results.settings(run)["command"] if (run / results.SETTINGS).exists() else None,
        "config": cells[0]["config"],
        "versions": cells[0]["versions"],
        "device": cells[0]["device"],
        "wall_time_s": sum(cell["wall_time_s"] for cell in cells),
        "class_counts": cells[0]["class_counts"],
        "cells": len(cells),
    }
