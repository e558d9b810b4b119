"""report.html: one file with the table, the plots and how the run was made."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from tde_trainer import plots, results, table
from tde_trainer.files import write_atomic
from tde_trainer.kinds import kind_of


def collect(runs: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Finished cells by method; with several runs, by run and method.

    Raises:
        UserError: see `results.finished_cells`.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for method, cells in results.by_method(results.finished_cells(run)).items():
            groups.setdefault(f"{run.name}: {method}" if len(runs) > 1 else method, []).extend(cells)
    return groups


def write_report(runs: Sequence[Path], path: Path) -> dict[str, Any]:
    """Write ``path``, and its plots into ``plots/`` beside it.

    Returns:
        The summary, see `results.summarize`.
    """
    groups = collect(runs)
    summary = results.summarize(groups)
    made = [how_made(run) for run in runs]
    images = plots.draw_all(groups)
    for name, png in images.items():
        write_atomic(path.parent / "plots" / f"{name}.png", png)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tde_trainer"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        kind=kind_of(summary),
        rows=summary["rows"],
        lifts=table.lift_lines(summary),
        percent=table.percent,
        counts_in_words=table.counts_in_words,
        plots=[(plots.CAPTIONS[name], base64.b64encode(png).decode()) for name, png in images.items()],
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
