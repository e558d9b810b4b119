"""Looking again at trained networks, from their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tde_kernels import FusedTDEHead
from tde_trainer import results
from tde_trainer.evaluate import Features, accuracy, sweep
from tde_trainer.kinds import CLASSIFICATION
from tde_trainer.metrics import GROUPS, group_masks
from tde_trainer.results import Result
from tde_trainer.trained import TrainedCell


def evaluate_cell(result: Result, alpha: float | None) -> dict[str, Any]:
    """Test accuracy of a classifier without TDE and at ``alpha``, None where it has no TDE."""
    cell = TrainedCell(result)
    test, counts = cell.features("test"), cell.class_counts
    return {
        "without_tde": accuracy(cell.head, test, counts, alpha=0.0),
        "with_tde": None if alpha is None else accuracy(cell.head, test, counts, alpha=alpha),
    }


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


def sweep_cell(result: Result, alphas: list[float]) -> dict[str, dict[str, list[float]]]:
    """Accuracy of a classifier's groups at each of ``alphas``, on validation and test images."""
    cell = TrainedCell(result)
    return {name: sweep(cell.head, cell.features(name), cell.class_counts, alphas) for name in ("val", "test")}


def exact_curves(path: Path) -> dict[str, dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
    """Test accuracy of every method with TDE as a function of alpha, exact at every alpha (Figure 4 of the paper).

    Of the first seed, from its checkpoint. For each group of classes that has any: where the steps begin, from 0 to
    the recipe's ``alpha_max``, and the accuracies from there on.
    """
    curves: dict[str, dict[str, tuple[NDArray[Any], NDArray[Any]]]] = {}
    first_seeds = {result.method: result for result in reversed(results.with_tde(path))}
    for cell in map(TrainedCell, first_seeds.values()):
        curves[cell.result.method] = {
            group: _steps(cell.head, cell.features("test"), mask, cell.config.head.alpha_max)
            for group, mask in group_masks(cell.class_counts).items()
            if mask.any()
        }
    return curves


def _steps(head: FusedTDEHead, data: Features, classes: Tensor, maximum: float) -> tuple[NDArray[Any], NDArray[Any]]:
    of_group = classes[data.y]
    curve = head.alpha_curve(data.x[of_group], data.y[of_group], "mean_per_class")
    starts, scores = curve.starts.cpu().numpy(), curve.scores.cpu().numpy()
    first = int(np.searchsorted(starts, 0, side="right")) - 1  # the step that 0 lies in
    last = int(np.searchsorted(starts, maximum, side="right"))
    return np.append(starts[first:last].clip(0), maximum), np.append(scores[first:last], scores[last - 1])
