"""What the optimizer's momentum does to features and to the tail: Figures 1b, 1c, 4 and 6 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from tde_trainer import plots, results
from tde_trainer.config import classifiers, config_from
from tde_trainer.errors import UserError
from tde_trainer.metrics import GROUPS
from tde_trainer.restore import exact_curves
from tde_trainer.run import train_run
from tde_trainer.schema import Config

MUS = (0.0, 0.5, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Trained:
    """A run at one momentum."""

    mu: float
    run: Path
    groups: dict[str, list[dict[str, Any]]]  # see `results.by_method`


def config_at(config: Config, mu: float, *, fixed_lr: bool) -> Config:
    """``config`` at momentum ``mu``, in a directory of its own.

    A momentum multiplies the step by ``1 / (1 - mu)`` in the long run. So that step sizes stay and momentum alone
    differs, the learning rate is multiplied by ``(1 - mu) / (1 - mu_recipe)``, unless ``fixed_lr``.
    """
    if not 0 <= mu < 1:
        raise UserError(f"--mu {mu:g} must be at least 0 and below 1")
    lr = config.train.lr if fixed_lr else config.train.lr * (1 - mu) / (1 - config.train.momentum)
    changed = replace(config, train=replace(config.train, momentum=mu, lr=lr), out=f"{config.out}/mu{mu:g}")
    return classifiers(config_from(asdict(changed)), "the recipe")


def train_all(
    config: Config, mus: Sequence[float], command: Sequence[str], console: Console, *, fixed_lr: bool
) -> None:
    """Train the recipe at every momentum, or go on with it."""
    for mu in mus:
        console.print(f"momentum {mu:g}", highlight=False)
        train_run(config_at(config, mu, fixed_lr=fixed_lr), command, console)


def collect(config: Config, mus: Sequence[float]) -> list[Trained]:
    """The finished runs of a study, by momentum."""
    runs = [(mu, Path(f"{config.out}/mu{mu:g}")) for mu in sorted(mus)]
    return [Trained(mu, run, results.by_method(results.finished_cells(run))) for mu, run in runs]


def draw_all(trained: Sequence[Trained], at: float) -> dict[str, bytes]:
    """Every figure, as PNG by name; the curves against alpha are of momentum ``at``."""
    methods = list(trained[0].groups)
    images = {
        name: plots.png(_by_class(trained, methods, name, label))
        for name, label in (("feature_norm", "mean norm of test features"), ("weight_norm", "norm of class weights"))
    }
    images["relative_change"] = plots.png(_relative_change(trained, methods))
    chosen = min(trained, key=lambda one: abs(one.mu - at))
    curves = exact_curves(chosen.run)
    if curves:
        images["alpha"] = plots.png(_alpha(curves, chosen.mu))
    return images


def _panels(methods: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5.2 * len(methods), 4.2), layout="constrained")
    return figure, figure.subplots(1, len(methods), squeeze=False)[0]


def _by_class(trained: Sequence[Trained], methods: Sequence[str], norm: str, label: str) -> Figure:
    figure, panels = _panels(methods)
    for axes, method in zip(panels, methods, strict=True):
        for index, one in enumerate(trained):
            cells = one.groups[method]
            values = plots.stack([cell[norm] for cell in cells])[:, plots.head_to_tail(cells[0])]
            plots.line(axes, np.arange(values.shape[1]), values, f"momentum {one.mu:g}", *plots.style(index))
        axes.set(title=method, xlabel="class, from head to tail", ylabel=label)
        plots.tidy(axes)
    panels[0].legend(frameon=False)
    return figure


def _relative_change(trained: Sequence[Trained], methods: Sequence[str]) -> Figure:
    """In percent of the accuracy at the largest momentum, as in the paper."""
    figure, panels = _panels(methods)
    mus = [one.mu for one in trained]
    for axes, method in zip(panels, methods, strict=True):
        for index, group in enumerate(GROUPS):
            means = np.array([mean_accuracy(one, method, group)["mean"] for one in trained], dtype=float)
            if np.isfinite(means).all() and means[-1] > 0:
                colour, marker = plots.GROUP_COLOURS[group], plots.MARKERS[index]
                axes.plot(range(len(mus)), 100 * (means / means[-1] - 1), color=colour, marker=marker, label=group)
        axes.set_xticks(range(len(mus)), [f"{mu:g}" for mu in mus])
        axes.set(title=method, xlabel="momentum", ylabel=f"accuracy, change in % of that at {mus[-1]:g}")
        plots.tidy(axes)
    panels[0].legend(frameon=False)
    return figure


def mean_accuracy(one: Trained, method: str, group: str) -> dict[str, Any]:
    """Over seeds, without TDE."""
    return results.mean_and_spread([cell["accuracy"]["without_tde"][group] for cell in one.groups[method]])


def _alpha(curves: dict[str, dict[str, tuple[Any, Any]]], mu: float) -> Figure:
    figure, panels = _panels(list(curves))
    for axes, (method, groups) in zip(panels, curves.items(), strict=True):
        for group, (starts, scores) in groups.items():
            axes.step(starts, 100 * scores, where="post", color=plots.GROUP_COLOURS[group], label=group, linewidth=1.2)
        axes.set(title=f"{method}, momentum {mu:g}", xlabel="alpha", ylabel="test accuracy in %", ylim=(0, 104))
        plots.tidy(axes)
    panels[0].legend(frameon=False)
    return figure
