"""A figure of average precision per class against the class's training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tde_trainer.detection.annotations import COMMON, RARE
from tde_trainer.plots import stack, style, tidy

NONE = 0.7  # stands for no training image on the logarithmic axis
REGIONS = {"rare": (NONE, RARE), "common": (RARE + 1, COMMON), "frequent": (COMMON + 1, np.inf)}  # first and last
SHADES = {"rare": "#e6e6e6", "common": "#f0f0f0", "frequent": "#fafafa"}
NAMED = 8  # classes at most


def class_plot(
    image_counts: Sequence[int], ap_by_row: Mapping[str, Sequence[float | None]], names: Sequence[str]
) -> Figure:
    """A mark for each class and row, a line for each row's mean over the rare, common, frequent classes.

    Named, at their mark of the last row, are the classes at which it differs most from the first, where there is room.

    Args:
        image_counts: ``[C]`` training images.
        ap_by_row: for each row ``[C]`` average precision in 0 .. 1; NaN or None where it is undefined.
        names: ``[C]`` names of the classes.

    Raises:
        ValueError: there is no row, or one is not of C values.
    """
    if not ap_by_row or any(len(ap) != len(image_counts) for ap in (names, *ap_by_row.values())):
        raise ValueError(f"wanted are rows and names of {len(image_counts)} classes")
    counts = np.maximum(image_counts, NONE)
    values = 100 * stack(list(ap_by_row.values()))
    figure = Figure(figsize=(10, 5.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", xlim=(0.75 * counts.min(), 1.3 * counts.max()), ylim=(-2, 104))
    _shade(axes)
    for index, (row, ap) in enumerate(zip(ap_by_row, values, strict=True)):
        colour, marker = style(index)
        axes.scatter(counts, ap, s=34, color=colour, marker=marker, alpha=0.75, label=row, linewidths=0, zorder=3)
        for first, last in REGIONS.values():
            members = (counts >= first) & (counts <= last) & ~np.isnan(ap)
            if members.any():
                ends = counts[members].min() / 1.05, counts[members].max() * 1.05
                axes.plot(ends, [ap[members].mean()] * 2, color=colour, linewidth=2.2)
    _name_changes(axes, counts, values, names)
    axes.set_xlabel("training images of the class")
    axes.set_ylabel("AP in % (lines: mean over the classes)")
    low, high = axes.get_xlim()
    axes.set_xticks([n for power in range(6) for n in (10**power, 2 * 10**power, 5 * 10**power) if low <= n <= high])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=len(values), frameon=False, fontsize=11)
    return figure


def _shade(axes: Axes) -> None:
    low, high = axes.get_xlim()
    for name, (first, last) in REGIONS.items():
        left, right = max(low, first - 0.5), min(high, last + 0.5)
        if left < right:
            axes.axvspan(left, right, color=SHADES[name], linewidth=0, zorder=0)
            axes.text((left * right) ** 0.5, 103, name, ha="center", va="top", color="#555", fontsize=11)


def _name_changes(axes: Axes, counts: NDArray[Any], values: NDArray[Any], names: Sequence[str]) -> None:
    change = np.nan_to_num(values[-1] - values[0])
    named: list[tuple[float, float]] = []
    for label in np.argsort(-np.abs(change), kind="stable"):
        up, here = change[label] > 0, (float(np.log10(counts[label])), float(values[-1, label]))
        has_room = all(abs(here[0] - x) > 0.3 or abs(here[1] - y) > 7 for x, y in named)
        if change[label] and has_room and len(named) < NAMED:
            named.append(here)
            axes.annotate(
                names[label].replace("_", " "),
                (counts[label], values[-1, label]),
                xytext=(0, 6 if up else -6),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.5},
                zorder=2,  # marks stay visible
            )
