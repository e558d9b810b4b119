"""The figures of the performance page, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.results import Row
from bench.scaling import along
from bench.shapes import SCALING
from bench.tables import label

GROWTH = {axis: f"{'loss' if axis == 'classes' else 'step'}_by_{axis}.png" for axis in SCALING}
ROOFLINE = "roofline.png"
# Okabe and Ito's palette, told apart by colour-blind readers too; markers differ as well
COLOURS = ("#0072B2", "#000000", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#999999", "#009E73")
MARKERS = ("o", "*", "P", "s", "^", "D", "v", "X")
_LEAST_MIB = 1.0  # of a process's memory: less is not told from nothing


def _style(position: int, rival: str) -> dict[str, Any]:
    colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
    return {"color": colour, "marker": marker, "label": label(rival).replace("*", "").replace("`", "")}


def _png(figure: Figure, axes: Axes) -> bytes:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def growth(rows: Sequence[Row], axis: str) -> bytes | None:
    """Time and peak memory against the size of an axis, a line for each rival."""
    measured = [row for row in rows if row.shape in SCALING[axis]]
    rivals = sorted(dict.fromkeys(row.rival for row in measured), key=lambda name: not name.startswith("tde_kernels"))
    if not measured:
        return None
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for position, rival in enumerate(rivals):
        points = along(measured, axis, rival)
        sizes, style = [size for size, _ in points], _style(position, rival)
        time.plot(sizes, [1e3 * row.seconds for _, row in points], **style)
        peaks = [(size, max(row.info["peak_mib"], _LEAST_MIB)) for size, row in points if "peak_mib" in row.info]
        if peaks:
            memory.plot(*zip(*peaks, strict=True), **style)
    for axes, what in ((time, "ms"), (memory, "MiB beyond inputs and results")):
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=what)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_ylim(bottom=_LEAST_MIB)
    rest = next(iter(SCALING[axis].values()))._asdict()
    held = ", ".join(f"{name} {size}" for name, size in rest.items() if name != axis)
    figure.suptitle(f"{measured[0].work} with {held}; float32")
    return _png(figure, time)


def roofline(rows: Sequence[Row], roofs: dict[str, dict[str, float]]) -> bytes | None:
    """Achieved operations a second against arithmetic intensity, below what the machine can do."""
    measured = [row for row in rows if row.ours and "flops" in row.info and row.dtype in roofs]
    if not measured:
        return None
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    intensities = np.logspace(-1, 4, 200)
    for roof, line in zip(roofs.items(), ("-", "--", ":"), strict=False):
        height = np.minimum(roof[1]["flops"], intensities * roof[1]["bytes"])
        axes.plot(intensities, height / 1e9, line, color="black", label=f"roof, {roof[0]}")
    kinds = list(dict.fromkeys((row.work, row.dtype) for row in measured))
    for position, (work, dtype) in enumerate(kinds):
        those = [row for row in measured if (row.work, row.dtype) == (work, dtype)]
        style = _style(position, f"{work}, {dtype}") | {"linestyle": "", "alpha": 0.8}
        style["markerfacecolor"] = style["color"] if dtype == "float32" else "none"
        axes.plot(
            [row.info["flops"] / row.info["bytes"] for row in those],
            [row.info["flops"] / row.seconds / 1e9 for row in those],
            **style,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="10⁹ operations a second")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("tde_kernels below the roof that this machine's best product and its memory set")
    return _png(figure, axes)
