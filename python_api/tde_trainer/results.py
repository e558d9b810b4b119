"""Finished cells of a run, and their summary over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tde_trainer.errors import UserError
from tde_trainer.files import read_json
from tde_trainer.kinds import Kind, kind_of
from tde_trainer.shape import NUMBER, misfits

FILE = "results.json"
SETTINGS = "run.json"  # at the top of a run: its config and command
_OF_A_CELL: dict[str, Any] = {
    "method": str,
    "seed": int,
    "config": dict,
    "versions": dict,
    "device": str,
    "class_counts": [int],
    "accuracy": {"without_tde": dict, "with_tde": (dict, type(None))},
    "alpha": (dict, type(None)),
    "wall_time_s": (int, float),
}
GRID = "grid.json"  # at the top of a grid of runs: their validation accuracy


@dataclass(frozen=True)
class Result:
    """One finished cell: its folder and its results.json."""

    directory: Path
    values: dict[str, Any]

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.values["method"])


def finished_cells(path: Path) -> list[Result]:
    """Results of a run's finished cells, in the order of its recipe; or of one cell, given its own folder.

    Raises:
        UserError: nothing there, or nothing finished.
    """
    if not path.is_dir():
        raise UserError(f"no run at {path}")
    if (path / SETTINGS).exists():
        config = settings(path)["config"]
        folders = [path / method / f"seed{seed}" for method in config["methods"] for seed in config["seeds"]]
    else:
        folders = [path]
    found = [_read(folder) for folder in folders if (folder / FILE).exists()]
    if not found:
        for file in sorted(path.glob(f"seed*/{FILE}")):
            raise UserError(
                f"{path} is the folder of a method; wanted is its run, {path.parent}, or one training, {file.parent}"
            )
        raise UserError(f"{path} holds no finished training; `tde train` makes one")
    return found


def with_tde(path: Path) -> list[Result]:
    """Those of `finished_cells` whose method has TDE."""
    return [result for result in finished_cells(path) if result.values["accuracy"]["with_tde"]]


def settings(run: Path) -> dict[str, Any]:
    """The config and the command that a run was started with.

    Raises:
        UserError: there is no such run.
    """
    return read_as(run / SETTINGS, {"config": {"methods": [str], "seeds": [int]}, "command": str})


def by_method(results: Iterable[Result]) -> dict[str, list[dict[str, Any]]]:
    """Values of the cells under each method, order kept."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result.method, []).append(result.values)
    return groups


def mean_and_spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation; None (JSON null) for what is undefined, such as the spread of one value."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def summarize(groups: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Table rows and the lift of TDE, each with mean and spread over seeds.

    Args:
        groups: see `by_method`; the keys become the rows' names.

    Returns:
        ``task``; ``rows``: one per method and inference mode; ``lift``: for each method with TDE, with minus without,
        paired by seed, so that its spread is not that of the two rows added up.

    Raises:
        UserError: the cells are of several tasks.
    """
    kind = _kind_of_all(groups)
    rows, lift = [], {}
    for label, cells in groups.items():
        for mode, suffix in kind.modes.items():
            accuracies = [cell["accuracy"][mode] for cell in cells if cell["accuracy"][mode]]
            if accuracies:
                columns = {measure: mean_and_spread([a[measure] for a in accuracies]) for measure in kind.measures}
                rows.append({"name": label + suffix, **columns})
        pairs = [c["accuracy"] for c in cells if c["accuracy"]["with_tde"]]
        if pairs:
            lift[label] = {name: mean_and_spread([_lift(pair, name) for pair in pairs]) for name in kind.measures}
            lift[label]["alpha"] = mean_and_spread([c["alpha"]["value"] for c in cells])
    return {"task": kind.task, "rows": rows, "lift": lift}


def _kind_of_all(groups: dict[str, list[dict[str, Any]]]) -> Kind:
    kinds = {
        kind.task: kind for kind in (kind_of(cell.get("config", {})) for cells in groups.values() for cell in cells)
    }
    if len(kinds) != 1:
        raise UserError(f"one table holds runs of one task, got {' and '.join(kinds) or 'none'}")
    return next(iter(kinds.values()))


def _lift(pair: dict[str, dict[str, Any]], measure: str) -> float | None:
    plain, direct = pair["without_tde"][measure], pair["with_tde"][measure]
    return None if plain is None or direct is None else direct - plain


def _read(folder: Path) -> Result:
    path = folder / FILE
    values = read_as(path, _OF_A_CELL)
    kind = kind_of(values["config"])
    for mode in kind.modes:
        if values["accuracy"].get(mode) is not None:
            _check(path, values["accuracy"][mode], dict.fromkeys(kind.measures, NUMBER), f"accuracy.{mode}")
    if values["alpha"] is not None:
        _check(path, values["alpha"], {"value": NUMBER}, "alpha")
    return Result(folder, values)


def read_as(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """A JSON object that a run wrote, of the form ``wanted``, see `shape.misfits`.

    Raises:
        UserError: it is missing, or something else.
    """
    values: dict[str, Any] = read_json(path)
    _check(path, values, wanted)
    return values


def _check(path: Path, value: Any, wanted: dict[str, Any], place: str = "") -> None:
    for misfit in misfits(value, wanted, place):
        raise UserError(f"{path} was not written by a run: {misfit}")
