"""Looking again at trained networks, from their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tde_kernels import FusedTDEHead
from tde_trainer import results
from tde_trainer.errors import UserError
from tde_trainer.evaluate import Features, accuracy, alpha_grid, sweep
from tde_trainer.files import dumps, write_atomic
from tde_trainer.kinds import CLASSIFICATION
from tde_trainer.methods import METHODS
from tde_trainer.metrics import GROUPS, group_masks
from tde_trainer.results import Result
from tde_trainer.schema import HeadConfig
from tde_trainer.trained import TrainedCell


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


def evaluate_runs(path: Path, alpha: float | None) -> dict[str, Any]:
    """Test accuracy of every finished cell under ``path``, summarized; ``alpha`` replaces the chosen one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in map(TrainedCell, results.finished_cells(path)):
        own = cell.result.values["alpha"]
        chosen = own and {"value": own["value"] if alpha is None else alpha}
        test, counts = cell.features("test"), cell.class_counts
        measured = {
            "without_tde": accuracy(cell.head, test, counts, alpha=0.0),
            "with_tde": chosen and accuracy(cell.head, test, counts, alpha=chosen["value"]),
        }
        groups.setdefault(cell.result.method, []).append({"alpha": chosen, "accuracy": measured})
    return results.summarize(groups)


def validate_run(path: Path, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Validation accuracy of every method without TDE, and with it at each of ``alphas``: rows as those of
    `results.summarize`, each with ``settings``, its ``head.alpha``, None without TDE.
    """
    rows: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for cell in map(TrainedCell, results.finished_cells(path)):
        for alpha in (None, *alphas) if cell.method.has_tde else (None,):
            name = cell.result.method + CLASSIFICATION.modes["without_tde" if alpha is None else "with_tde"]
            measured = accuracy(cell.head, cell.features("val"), cell.class_counts, alpha=alpha or 0.0)
            rows.setdefault((name, alpha), []).append(measured)
    return [
        {
            "name": name,
            "settings": {"head.alpha": alpha},
            **{group: results.mean_and_spread([seed[group] for seed in seeds]) for group in GROUPS},
        }
        for (name, alpha), seeds in rows.items()
    ]


def sweep_run(path: Path, maximum: float | None, steps: int | None) -> tuple[Path, dict[str, Any]]:
    """Accuracy against alpha on validation and test, mean and spread over seeds, written to sweep.json.

    Returns:
        The file's path, and for each method ``{"alphas": [A], "val": {group: [A]}, "test": ...}``.
    """
    cells: dict[str, list[dict[str, dict[str, list[float]]]]] = {}
    alphas: list[float] = []
    for cell in map(TrainedCell, _with_tde(path)):
        alphas = alpha_grid(grid_of(cell.config.head, maximum, steps))
        curves = {name: sweep(cell.head, cell.features(name), cell.class_counts, alphas) for name in ("val", "test")}
        cells.setdefault(cell.result.method, []).append(curves)
    if not cells:
        raise UserError(f"{path} holds no method with TDE")
    summary = {
        method: {"alphas": alphas, **{split: _mean_curve(curves, split) for split in ("val", "test")}}
        for method, curves in cells.items()
    }
    file = path / "sweep.json"
    write_atomic(file, dumps(summary, indent=1) + "\n")
    return file, summary


def exact_curves(path: Path) -> dict[str, dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
    """Test accuracy of every method with TDE as a function of alpha, exact at every alpha (Figure 4 of the paper).

    Of the first seed, from its checkpoint. For each group of classes that has any: where the steps begin, from 0 to
    the recipe's ``alpha_max``, and the accuracies from there on.
    """
    curves: dict[str, dict[str, tuple[NDArray[Any], NDArray[Any]]]] = {}
    first_seeds = {result.method: result for result in reversed(_with_tde(path))}
    for cell in map(TrainedCell, first_seeds.values()):
        curves[cell.result.method] = {
            group: _steps(cell.head, cell.features("test"), mask, cell.config.head.alpha_max)
            for group, mask in group_masks(cell.class_counts).items()
            if mask.any()
        }
    return curves


def _with_tde(path: Path) -> list[Result]:
    return [result for result in results.finished_cells(path) if METHODS[result.method].has_tde]


def _steps(head: FusedTDEHead, data: Features, classes: Tensor, maximum: float) -> tuple[NDArray[Any], NDArray[Any]]:
    of_group = classes[data.y]
    curve = head.alpha_curve(data.x[of_group], data.y[of_group], "mean_per_class")
    starts, scores = curve.starts.cpu().numpy(), curve.scores.cpu().numpy()
    first = int(np.searchsorted(starts, 0, side="right")) - 1  # the step that 0 lies in
    last = int(np.searchsorted(starts, maximum, side="right"))
    return np.append(starts[first:last].clip(0), maximum), np.append(scores[first:last], scores[last - 1])


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


def _mean_curve(curves: list[dict[str, dict[str, list[float]]]], split: str) -> dict[str, list[dict[str, Any]]]:
    return {
        group: [results.mean_and_spread(point) for point in zip(*(c[split][group] for c in curves), strict=True)]
        for group in GROUPS
    }
