"""`tde grid`: a run for every combination of settings, compared by validation accuracy (Table 6 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tde_trainer import results
from tde_trainer.config import ALIASES, NOT_PART_OF_A_RUN, flatten, load_config, parse_overrides
from tde_trainer.data import DATASETS
from tde_trainer.errors import UserError
from tde_trainer.files import dumps, write_atomic
from tde_trainer.metrics import GROUPS
from tde_trainer.network import build_network
from tde_trainer.published import published_table
from tde_trainer.ranks import process, together
from tde_trainer.report import how_made
from tde_trainer.restore import validate_run
from tde_trainer.run import train_run
from tde_trainer.schema import Config
from tde_trainer.table import dense, heading, in_words, percent

PAPERS_AXES = ["head.num_heads", "head.tau", "head.gamma"]
PAPERS_ALPHAS = ["2.5", "3.0", "3.5"]


@dataclass(frozen=True)
class Grid:
    """What is trained, and the alphas at which every network is read."""

    config: Config  # what the runs share
    axes: list[str]  # the keys in which they differ
    runs: dict[str, Config]  # by ``KEY=VALUE,...``, the name of its folder
    alphas: list[float]


def plan(recipe: str, overrides: Sequence[str]) -> Grid:
    """A grid of de-confounded training, unless ``methods`` says otherwise.

    ``KEY=V1,V2`` is an axis, ``KEY=[V1,V2]`` a value. Of several axes every combination is a run; without any, the
    runs are the paper's: one setting at a time is changed. ``head.alpha`` is no axis, as it takes no training.

    Raises:
        UserError: an axis with an empty or a repeated value, or of a key that computes nothing; what `load_config`
            refuses.
    """
    parse_overrides(overrides)  # whether each is KEY=VALUE
    values = {"out": [f"runs/{Path(recipe).stem}_grid"], "methods": ["[deconfound]"]}
    values |= {key: _values(key, text) for key, _, text in (item.partition("=") for item in overrides)}
    alphas = values.pop("head.alpha", PAPERS_ALPHAS)
    fixed = [f"{key}={given[0]}" for key, given in values.items() if len(given) == 1]
    axes = {key: given for key, given in values.items() if len(given) > 1}
    combinations = (
        [dict(zip(axes, point, strict=True)) for point in product(*axes.values())] if axes else _papers_runs()
    )
    config, runs = load_config(recipe, fixed), {}
    for combination in combinations:
        chosen = [f"{key}={value}" for key, value in combination.items()]
        name = ",".join(chosen)
        runs[name] = load_config(recipe, [*fixed, *chosen, f"out={config.out}/{name}"])
    return Grid(config, list(combinations[0]), runs, [_alpha(recipe, fixed, text) for text in alphas])


def run_grid(grid: Grid, command: Sequence[str], console: Console) -> dict[str, Any]:
    """Train what is not yet trained, and write grid.json.

    Returns:
        What that holds: ``rows``, the best first, each with its settings and its validation accuracy by group, and how
        they were made.

    Raises:
        UserError: see `train_run`.
    """
    # Whatever can be wrong with a corner of the grid shows here, not when its turn comes.
    with together():
        data = DATASETS[grid.config.data.name](grid.config.data, grid.config.seeds[0])
        for config in grid.runs.values():
            for method in config.methods:
                build_network(config, method, data.channels, data.num_classes)
    rows: list[dict[str, Any]] = []
    for name, config in grid.runs.items():
        console.print(name, highlight=False, soft_wrap=True)
        train_run(config, command, console)
        settings = flatten(asdict(config))
        axes = {key: settings[ALIASES.get(key, key)] for key in grid.axes}
        found = validate_run(Path(config.out), grid.alphas)
        console.print(f"{name}: validation {_few_words(found)}", highlight=False, soft_wrap=True)
        rows += [{**row, "run": name, "settings": {**axes, **row["settings"]}} for row in found]
    rows.sort(key=lambda row: -row["overall"]["mean"])
    made = [how_made(Path(config.out)) for config in grid.runs.values()]
    summary = {
        "rows": rows,
        "axes": grid.axes,
        "alphas": grid.alphas,
        **made[0],
        "run": grid.config.out,
        "config": asdict(grid.config),
        "wall_time_s": sum(one["wall_time_s"] for one in made),
        "cells": sum(one["cells"] for one in made),
    }
    with together():
        if process().is_main_process:
            write_atomic(Path(grid.config.out) / results.GRID, dumps(summary, indent=1) + "\n")
    return summary


def grid_table(summary: dict[str, Any]) -> Table:
    """Rows by validation accuracy, the best first and marked."""
    settings = [*map(heading, summary["axes"]), "alpha", "method"]
    table = dense("Validation accuracy in %, the best first", settings, [*GROUPS, ""])
    for place, row in enumerate(summary["rows"]):
        values = [in_words(row["settings"][key]) for key in (*summary["axes"], "head.alpha")]
        figures = [percent(row[group]) for group in GROUPS]
        table.add_row(*values, row["name"], *figures, "" if place else "best")
    return table


def _values(key: str, text: str) -> list[str]:
    """Of an axis; of any other key, the one that it has."""
    if "," not in text or text[0] in "[{\"'":
        return [text]
    values = [value.strip() for value in text.split(",")]
    if "" in values or len(set(values)) != len(values):
        raise UserError(f"{key}={text}: the values of an axis must be without repeats, and none empty")
    if key in NOT_PART_OF_A_RUN:
        raise UserError(f"{key}={text}: {key} can be no axis, as it says where or how to run, not what to compute")
    return values


def _papers_runs() -> list[dict[str, str]]:
    runs = [{key: in_words(row.settings[key]) for key in PAPERS_AXES} for row in published_table(6).rows]
    return [run for place, run in enumerate(runs) if run not in runs[:place]]


def _alpha(recipe: str, fixed: Sequence[str], text: str) -> float:
    alpha = load_config(recipe, [*fixed, f"head.alpha={text}"]).head.alpha
    if alpha is None:
        raise UserError(f"head.alpha={text}: wanted are the alphas at which to read every network, such as 2.5,3.0")
    return alpha


def _few_words(rows: Sequence[dict[str, Any]]) -> str:
    shown = []
    for row in rows:
        alpha = row["settings"]["head.alpha"]
        shown.append(f"{row['name']}{'' if alpha is None else f' at {alpha:g}'} {percent(row['overall'])}")
    return ", ".join(shown)
