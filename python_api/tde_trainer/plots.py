"""The figures of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tde_trainer.metrics import GROUPS

# Okabe and Ito's palette, told apart by colour-blind readers too; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GROUP_COLOURS = dict(zip(GROUPS, (*COLOURS[:3], "#000000"), strict=True))

CAPTIONS = {
    "alpha": "Test accuracy against alpha; the dashed line is the alpha in use, on average over the seeds "
    "(Figure 4 of the paper).",
    "per_class": "Test accuracy per class without and with TDE; classes from head to tail.",
    "feature_norm": "Mean norm of the test images' feature vectors per class, relative to the mean over classes "
    "(Figure 1b of the paper).",
    "weight_norm": "Norm of the class weight per class, relative to the mean over classes (Figure 6 of the paper).",
}

Groups = dict[str, list[dict[str, Any]]]


def draw_all(groups: Groups) -> dict[str, bytes]:
    """Every figure that the results allow, by its name in `CAPTIONS`.

    Lines and bars are means over seeds, bands and whiskers the sample standard deviation.
    """
    with_tde = {name: cells for name, cells in _having("sweep", groups).items() if all(cell["alpha"] for cell in cells)}
    images = {}
    if with_tde:
        images["alpha"] = _panels(with_tde, _draw_alpha)
        images["per_class"] = _panels(with_tde, _draw_per_class)
    for norm in ("feature_norm", "weight_norm"):
        if measured := _having(norm, groups):
            images[norm] = png(_draw_norms(measured, norm))
    return images


def _having(key: str, groups: Groups) -> Groups:
    return {name: cells for name, cells in groups.items() if all(key in cell for cell in cells)}


def _panels(groups: Groups, draw: Callable[[Axes, list[dict[str, Any]]], None]) -> bytes:
    figure = Figure(figsize=(5.2 * len(groups), 4.4), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (name, cells) in zip(panels, groups.items(), strict=True):
        draw(axes, cells)
        axes.set(title=name, ylim=(0, 104))
        tidy(axes)
    panels[0].set_ylabel("test accuracy in %")
    # One legend for all panels, above them, where it hides nothing.
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return png(figure)


def _draw_alpha(axes: Axes, cells: list[dict[str, Any]]) -> None:
    alphas = cells[0]["sweep"]["alphas"]
    for group, colour in GROUP_COLOURS.items():
        curves = stack([cell["sweep"]["test"][group] for cell in cells if cell["sweep"]["alphas"] == alphas])
        if not np.isnan(curves).all():
            line(axes, alphas, 100 * curves, group, colour, "")
    chosen = float(np.mean([cell["alpha"]["value"] for cell in cells]))
    axes.axvline(chosen, color="#777", linestyle="--", linewidth=1.2, label="alpha in use")
    axes.set_xlabel("alpha")


def _draw_per_class(axes: Axes, cells: list[dict[str, Any]]) -> None:
    order = head_to_tail(cells[0])
    positions = np.arange(len(order))
    for shift, mode, label, colour in (
        (-0.2, "without_tde", "without TDE", COLOURS[5]),
        (0.2, "with_tde", "with TDE", COLOURS[0]),
    ):
        values = 100 * stack([cell["accuracy"][mode]["per_class"] for cell in cells])[:, order]
        mean, spread = values.mean(0), _std(values)
        whiskers = np.stack([np.minimum(spread, mean), np.minimum(spread, 100 - mean)])  # accuracy stays in 0 .. 100
        axes.bar(positions + shift, mean, 0.38, color=colour, label=label)
        axes.errorbar(positions + shift, mean, whiskers, fmt="none", ecolor="#444", elinewidth=1)
    _class_axis(axes, cells[0])


def _draw_norms(groups: Groups, norm: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, cells) in enumerate(groups.items()):
        values = stack([cell[norm] for cell in cells])
        values = (values / np.nanmean(values, axis=1, keepdims=True))[:, head_to_tail(cells[0])]
        line(axes, np.arange(values.shape[1]), values, name, *style(index))
    _class_axis(axes, next(iter(groups.values()))[0])
    axes.set_ylabel(f"mean {norm.replace('_', ' ')}, relative" if norm == "feature_norm" else "weight norm, relative")
    axes.legend(frameon=False)
    tidy(axes)
    return figure


def line(
    axes: Axes, x: Sequence[float] | NDArray[Any], curves: NDArray[Any], label: str, colour: str, marker: str
) -> None:
    mean, spread = curves.mean(0), _std(curves)
    axes.plot(x, mean, color=colour, label=label, marker=marker or None, markersize=5, linewidth=1.8)
    axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def _class_axis(axes: Axes, cell: dict[str, Any]) -> None:
    order = head_to_tail(cell)
    names, counts = ([cell[key][i] for i in order] for key in ("class_names", "class_counts"))
    few_enough = len(names) <= 20
    if few_enough:
        labels = [f"{name}, {count}" for name, count in zip(names, counts, strict=True)]
        axes.set_xticks(range(len(names)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlabel("class, and its training images" if few_enough else "class, from head to tail")


def head_to_tail(cell: dict[str, Any]) -> NDArray[Any]:
    """Classes from the most training images to the fewest; ties in label order."""
    return np.argsort(-np.array(cell["class_counts"]), kind="stable")


def style(index: int) -> tuple[str, str]:
    """Colour and marker of the line of that number; no two of the first 36 share both."""
    rounds, colour = divmod(index, len(COLOURS))
    return COLOURS[colour], MARKERS[(colour + rounds) % len(MARKERS)]


def stack(rows: Sequence[Sequence[float | None]]) -> NDArray[Any]:
    return np.array(rows, dtype=float)  # None becomes NaN


def _std(values: NDArray[Any]) -> NDArray[Any]:
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#ddd", linewidth=0.7)
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
