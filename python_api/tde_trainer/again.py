"""A run's finished trainings evaluated again, from their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tde_trainer import results
from tde_trainer.config import config_from
from tde_trainer.device import cpu_threads
from tde_trainer.errors import UserError
from tde_trainer.evaluate import alpha_grid
from tde_trainer.files import dumps, write_atomic
from tde_trainer.kinds import kind_of
from tde_trainer.results import Result
from tde_trainer.schema import HeadConfig
from tde_trainer.task import Task
from tde_trainer.tasks import task_of


def parse_alpha(text: str | None) -> float | None:
    """``"alpha=1.5"`` as 1.5.

    Raises:
        UserError: anything else, or a value that is not finite.
    """
    if text is None:
        return None
    key, _, value = text.partition("=")
    if key != "alpha":
        raise UserError(f"expected alpha=VALUE, got {text!r}")
    try:
        alpha = float(value)
    except ValueError:
        raise UserError(f"alpha={value!r} is not a number") from None
    if not math.isfinite(alpha):
        raise UserError(f"alpha={value} must be finite")
    return alpha


def grid_of(config: HeadConfig, maximum: float | None, steps: int | None) -> HeadConfig:
    """``config`` with another largest alpha and number of alphas, where they are given.

    Raises:
        UserError: they are out of range.
    """
    maximum = config.alpha_max if maximum is None else maximum
    steps = config.alpha_steps if steps is None else steps
    if not (math.isfinite(maximum) and maximum >= 0) or steps < 2:
        raise UserError(f"--max {maximum:g} must be finite and not negative, --steps {steps} at least 2")
    return replace(config, alpha_max=maximum, alpha_steps=steps)


def evaluate_runs(path: Path, alpha: float | None) -> dict[str, Any]:
    """Every finished training under ``path`` on its test images, summarized; ``alpha`` replaces the chosen ones."""
    cells = results.finished_cells(path)
    groups: dict[str, list[dict[str, Any]]] = {}
    with _task(cells) as task:
        for cell in cells:
            own = cell.values["alpha"]
            chosen = None if own is None else own["value"] if alpha is None else alpha
            measured = {"alpha": {"value": chosen}, "accuracy": task.evaluate(cell, chosen)}
            groups.setdefault(cell.method, []).append({"config": cell.values["config"], **measured})
    return results.summarize(groups)


def sweep_run(path: Path, maximum: float | None, steps: int | None) -> tuple[Path, dict[str, Any]]:
    """Measures against alpha on validation and test, mean and spread over seeds, written to sweep.json.

    Returns:
        The file's path, and for each method ``{"task": name, "alphas": [A], "val": {measure: [A]}, "test": ...}``;
        ``val`` only where there are validation images.
    """
    cells = results.with_tde(path)
    if not cells:
        raise UserError(f"{path} holds no method with TDE")
    curves: dict[str, list[dict[str, dict[str, list[float]]]]] = {}
    with _task(cells) as task:
        alphas = task.alphas
        if maximum is not None or steps is not None:
            alphas = alpha_grid(grid_of(HeadConfig(alpha_max=alphas[-1], alpha_steps=len(alphas)), maximum, steps))
        for cell in cells:
            curves.setdefault(cell.method, []).append(task.sweep(cell, alphas))
    described = {"task": kind_of(cells[0].values["config"]).task, "alphas": alphas}
    summary = {
        method: described | {split: _mean_curve([curve[split] for curve in seeds]) for split in seeds[0]}
        for method, seeds in curves.items()
    }
    file = path / "sweep.json"
    write_atomic(file, dumps(summary, indent=1) + "\n")
    return file, summary


@contextmanager
def _task(cells: list[Result]) -> Iterator[Task[Any]]:
    """What they were trained for, with as many CPU threads as then: with others a product may be rounded otherwise."""
    config = config_from(cells[0].values["config"])
    with cpu_threads(config.train.threads):
        yield task_of(config)


def _mean_curve(seeds: list[dict[str, list[float]]]) -> dict[str, list[dict[str, Any]]]:
    return {
        measure: [results.mean_and_spread(point) for point in zip(*(curve[measure] for curve in seeds), strict=True)]
        for measure in seeds[0]
    }
