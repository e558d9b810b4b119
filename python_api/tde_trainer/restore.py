"""Looking again at trained networks, from their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tde_kernels import FusedTDEHead
from tde_trainer import checkpoint, results
from tde_trainer.config import config_from
from tde_trainer.data import DATASETS
from tde_trainer.device import make_accelerator
from tde_trainer.errors import UserError
from tde_trainer.evaluate import Features, accuracy, alpha_grid, extract, sweep
from tde_trainer.files import dumps, write_atomic
from tde_trainer.methods import METHODS
from tde_trainer.metrics import GROUPS, group_masks
from tde_trainer.network import Network, build_network
from tde_trainer.results import Result
from tde_trainer.schema import Config, HeadConfig


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
    for result, network, features, counts in _restored(results.finished_cells(path), "test"):
        chosen = result.values["alpha"] and {"value": result.values["alpha"]["value"] if alpha is None else alpha}
        measured = {
            "without_tde": accuracy(network.head, features["test"], counts, alpha=0.0),
            "with_tde": chosen and accuracy(network.head, features["test"], counts, alpha=chosen["value"]),
        }
        groups.setdefault(result.method, []).append({"alpha": chosen, "accuracy": measured})
    return results.summarize(groups)


def validate_run(path: Path, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Validation accuracy of every method without TDE, and with it at each of ``alphas``: rows as those of
    `results.summarize`, each with ``settings``, its ``head.alpha``, None without TDE.
    """
    rows: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for result, network, features, counts in _restored(results.finished_cells(path), "val"):
        for alpha in (None, *alphas) if network.method.has_tde else (None,):
            name = result.method + results.MODES["without_tde" if alpha is None else "with_tde"]
            measured = accuracy(network.head, features["val"], counts, alpha=alpha or 0.0)
            rows.setdefault((name, alpha), []).append(measured)
    return [
        {
            "name": name,
            "settings": {"head.alpha": alpha},
            **{group: results.mean_and_spread([cell[group] for cell in cells]) for group in GROUPS},
        }
        for (name, alpha), cells in rows.items()
    ]


def sweep_run(path: Path, maximum: float | None, steps: int | None) -> tuple[Path, dict[str, Any]]:
    """Accuracy against alpha on validation and test, mean and spread over seeds, written to sweep.json.

    Returns:
        The file's path, and for each method ``{"alphas": [A], "val": {group: [A]}, "test": ...}``.
    """
    cells: dict[str, list[dict[str, dict[str, list[float]]]]] = {}
    alphas: list[float] = []
    for result, network, features, counts in _restored(_with_tde(path), "val", "test"):
        alphas = alpha_grid(_grid(config_from(result.values["config"]).head, maximum, steps))
        curves = {name: sweep(network.head, data, counts, alphas) for name, data in features.items()}
        cells.setdefault(result.method, []).append(curves)
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
    for result, network, features, counts in _restored(first_seeds.values(), "test"):
        maximum = config_from(result.values["config"]).head.alpha_max
        curves[result.method] = {
            group: _steps(network.head, features["test"], mask, maximum)
            for group, mask in group_masks(counts).items()
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


def _grid(config: HeadConfig, maximum: float | None, steps: int | None) -> HeadConfig:
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


def _restored(cells: Iterable[Result], *splits: str) -> Iterator[tuple[Result, Network, dict[str, Features], Tensor]]:
    """Each of the finished cells with its network, the features of the splits, and the class counts."""
    for result in cells:
        config: Config = config_from(result.values["config"])
        accelerator = make_accelerator(config.precision)
        data = DATASETS[config.data.name](config.data, result.values["seed"])
        network = build_network(config, result.method, data.channels, data.num_classes)
        checkpoint.load(result.directory, network)
        network.to(accelerator.device).eval()
        features = {
            split: extract(network, getattr(data, split), data.pipeline, config.train.batch_size, accelerator)
            for split in splits
        }
        yield result, network, features, data.class_counts.to(accelerator.device)
