"""What the toy gives: toy.json, its figure and its page."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from tde_trainer.device import cpu_threads
from tde_trainer.errors import UserError
from tde_trainer.files import dumps, write_atomic
from tde_trainer.markdown import render
from tde_trainer.plots import COLOURS, png, tidy
from tde_trainer.results import mean_and_spread
from tde_trainer.run import versions
from tde_trainer.study.toy import HEAD, TAIL, WAYS, Setting, Trained, angles, boundary, measure, simulate
from tde_trainer.table import percent

FEATURES = {"positive": Setting(), "either_sign": Setting(positive=False)}
MEASURES = ("accuracy", "head", "tail", "boundary")
CLASSES = ((TAIL, "tail class", COLOURS[1]), (HEAD, "head class", COLOURS[0]))
BIN = 2  # degrees


def run_toy(seeds: int, out: Path, page: Path | None, command: str) -> dict[str, Any]:
    """Simulate and write ``out``; with ``page`` that too, its image and results in folders beside it.

    Args:
        seeds: how many, from 0 on.
        out: folder of page.md, toy.png and toy.json.
        page: another page to write.
        command: the command line, kept in page and results.

    Returns:
        What toy.json holds.

    Raises:
        UserError: no seed, or one of the paths is not what it should be.
    """
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file")
    if page is not None and page.is_dir():
        raise UserError(f"--page {page} is a folder")
    began = time.perf_counter()
    with cpu_threads(1):
        trained = {name: [simulate(setting, s) for s in range(seeds)] for name, setting in FEATURES.items()}
        image = draw_ways(trained["positive"][0])
        measured = {name: summarize([measure(one) for one in each]) for name, each in trained.items()}
    results = {
        "setting": asdict(FEATURES["positive"]),
        "bayes": _bayes(FEATURES["positive"]),
        "features": measured,
        "command": command,
        "versions": versions(),
        "wall_time_s": time.perf_counter() - began,
    }
    _write(results, image, out / "page.md", out, out)
    if page is not None:
        _write(results, image, page, page.parent / "images", page.parent / "results")
    return results


def summarize(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds, and each seed's own figures."""
    rows = []
    for way, name in WAYS.items():
        each = [seed["ways"][way] for seed in measured]
        rows.append({"name": name, **{key: mean_and_spread([values[key] for values in each]) for key in MEASURES}})
    scalars = {key: mean_and_spread([seed[key] for seed in measured]) for key in ("alpha", "boundary_projection")}
    return {"rows": rows, **scalars, "seeds": list(measured)}


def page_text(results: dict[str, Any], image: str, data: str) -> str:
    """The page, in markdown; ``image`` and ``data`` are links."""
    return render("toy.md.j2", **results, number=number, image=image, data=data)


def number(entry: dict[str, Any]) -> str:
    """Mean and spread, ``"-0.30 ± 0.31"``; ``"n/a"`` where there is none."""
    if entry["mean"] is None:
        return "n/a"
    return f"{entry['mean']:.2f}" if entry["std"] is None else f"{entry['mean']:.2f} ± {entry['std']:.2f}"


def toy_table(features: str, kind: dict[str, Any]) -> Table:
    """Way by measure, for the terminal."""
    table = Table(title=f"features: {features.replace('_', ' ')}; balanced test, recalls in %")
    for column in ("way", *MEASURES):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in kind["rows"]:
        table.add_row(row["name"], *(percent(row[key]) for key in MEASURES[:3]), number(row["boundary"]))
    return table


def draw_ways(trained: Trained) -> bytes:
    """Four panels: the angles of both classes' test features, and the boundary."""
    ways, y = trained.ways, trained.test.y
    features, normal = ways["conventional"].features(trained.test.x), ways["conventional"].normal()
    frozen = angles(features, normal)
    shown = {
        "conventional": frozen,
        "one_stage": angles(ways["one_stage"].features(trained.test.x), ways["one_stage"].normal()),
        "two_stage": frozen,
        "tde": angles(ways["tde"].direct(features), normal),
    }
    lowest = min(values.min().item() for values in shown.values()) // BIN * BIN
    bins = np.arange(lowest, max(values.max().item() for values in shown.values()) + BIN, BIN)
    boundaries = dict.fromkeys(WAYS, 0.0) | {"two_stage": _moved(trained, frozen)}

    figure = Figure(figsize=(13, 3.9), layout="constrained")
    panels = figure.subplots(1, len(WAYS), sharex=True, sharey=True)
    for axes, (way, values) in zip(panels, shown.items(), strict=True):
        for label, name, colour in CLASSES:
            axes.hist(values[y == label], bins, density=True, color=colour, alpha=0.5, label=name)
            if way == "tde":
                before = frozen[y == label]
                axes.hist(before, bins, density=True, color=colour, histtype="step", linestyle=":", linewidth=1.3)
        if way == "two_stage":
            axes.axvline(0, color="#777", linestyle=":", linewidth=1.5, label="before the adjustment")
        axes.axvline(boundaries[way], color="#000", linewidth=1.8, label="boundary")
        axes.set(title=WAYS[way], xlabel="angle of the feature, in degrees")
        tidy(axes)
    panels[0].set_ylabel("density")
    handles, labels = panels[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return png(figure)


def _moved(trained: Trained, frozen: Tensor) -> float:
    """Where the second stage puts the boundary among the frozen angles; not a number where it has none."""
    at = boundary(trained.ways["two_stage"])
    return math.nan if at is None else frozen[(trained.test.x[:, 0] - at).abs().argmin()].item()


def _bayes(setting: Setting) -> dict[str, float]:
    """The best boundary for the training data's class counts, and the best accuracy on a balanced test."""
    return {
        "imbalanced_boundary": -(setting.std**2) / 2 * math.log(setting.head_count / setting.tail_count),
        "balanced_accuracy": NormalDist().cdf(1 / setting.std),
    }


def _write(results: dict[str, Any], image: bytes, page: Path, images: Path, data: Path) -> None:
    picture, values = images / "toy.png", data / "toy.json"
    write_atomic(picture, image)
    write_atomic(values, dumps(results, indent=1) + "\n")
    links = (path.relative_to(page.parent).as_posix() for path in (picture, values))
    write_atomic(page, page_text(results, *links))
