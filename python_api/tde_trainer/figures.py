"""The figures of a run's report, by its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tde_trainer import plots
from tde_trainer.detection import figures as of_detectors
from tde_trainer.kinds import CLASSIFICATION, DETECTION, SCALING
from tde_trainer.results import Result

Groups = dict[str, list[Result]]  # trainings of each row
Drawn = tuple[dict[str, bytes], list[str]]  # PNGs by name, and for each figure that can't be drawn a line that says why


@dataclass(frozen=True)
class Figures:
    """Those of one task."""

    captions: dict[str, str]  # by name
    draw: Callable[[Groups], Drawn]


def _of_classifiers(groups: Groups) -> Drawn:
    return plots.draw_all({name: [cell.values for cell in cells] for name, cells in groups.items()}), []


FIGURES = {
    CLASSIFICATION.task: Figures(plots.CAPTIONS, _of_classifiers),
    DETECTION.task: Figures(of_detectors.CAPTIONS, of_detectors.draw_all),
    SCALING.task: Figures({}, lambda groups: ({}, [])),
}
