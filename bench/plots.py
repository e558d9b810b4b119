"""The figures of the performance page, as PNG."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.shapes import SCALING

# Okabe and Ito's palette, told apart by colour-blind readers too; markers differ as well
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#999999", "#009E73", "#000000")
MARKERS = ("o", "P", "s", "^", "D", "v", "X", "*")
_LEAST_MIB = 1.0  # of a process's memory: less is not told from nothing


def loss_by_classes(benchmarks: list[dict[str, Any]], labels: dict[str, str]) -> bytes:
    """Time and peak memory of the loss against the number of classes, a line for each rival."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for (rival, label), colour, marker in zip(labels.items(), COLOURS, MARKERS, strict=True):
        found = [
            b for b in benchmarks if b["extra_info"]["rival"] == rival and b["group"].removeprefix("loss ") in SCALING
        ]
        if not found:
            continue
        found.sort(key=lambda b: int(b["extra_info"]["shape"]["classes"]))
        classes = [b["extra_info"]["shape"]["classes"] for b in found]
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": label.replace("*", "").replace("`", "")}
        time.plot(classes, [1e3 * b["stats"]["median"] for b in found], **style)
        memory.plot(classes, [max(b["extra_info"]["peak_mib"], _LEAST_MIB) for b in found], **style)
    logits = sorted((shape.classes, 4 * shape.batch * shape.classes / 2**20) for shape in SCALING.values())
    memory.plot(*zip(*logits, strict=True), color="black", linestyle=":", label="the logits alone")
    for axes, what in ((time, "ms a step"), (memory, "MiB beyond inputs and gradients")):
        axes.set(xscale="log", yscale="log", xlabel="classes", ylabel=what)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_ylim(bottom=_LEAST_MIB)
    batch, dim, _ = next(iter(SCALING.values()))
    figure.suptitle(f"Training step with its loss, {batch} x {dim} features, float32")
    handles, names = memory.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
