"""What the runs of a task measure: all that their tables and reports need to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tde_trainer.errors import unknown
from tde_trainer.metrics import GROUPS

PLAIN = {"without_tde": "", "with_tde": " + TDE"}


@dataclass(frozen=True)
class Kind:
    """The results of one task."""

    task: str  # as configs and summaries name it
    measures: tuple[str, ...]  # columns; each in 0 .. 1, undefined where nothing is there to measure
    headline: str  # the measure that stands for all
    tail: str  # the measure of the classes with the fewest images
    modes: dict[str, str]  # ways of inference, each with what it adds to a method's name
    tables: tuple[int, ...]  # of the paper; the first that fits stands beside a run on the page of results
    title: str  # what the measures are
    note: str  # on the columns, in whole sentences
    tail_in_words: str
    alpha: str  # how it was found


CLASSIFICATION = Kind(
    task="classification",
    measures=GROUPS,
    headline="overall",
    tail="few",
    modes=PLAIN,
    tables=(3, 2),
    title="Test accuracy",
    note="Many-shot classes have more than 100 training images, few-shot classes fewer than 20.",
    tail_in_words="few-shot",
    alpha="was chosen on the validation split unless the config sets it",
)
DETECTION = Kind(
    task="detection",
    measures=("AP", "AP50", "AP75", "AP_r", "AP_c", "AP_f", "AP_bbox"),
    headline="AP",
    tail="AP_r",
    modes={**PLAIN, "with_tde_everywhere": " + TDE, background too"},
    tables=(4,),
    title="Average precision",
    note="AP is of masks, AP_bbox of boxes. AP_r is that of classes with up to 10 training images, AP_c of those with "
    "11 to 100, AP_f of those with more.",
    tail_in_words="AP_r",
    alpha="is the one in each training's results.json, which says how it was chosen",
)
SCALING = Kind(
    task="scaling",
    measures=("many", "medium", "few", "top1"),
    headline="top1",
    tail="few",
    modes={"without_tde": ""},
    tables=(),
    title="Test accuracy",
    note="It is that of all test samples (top1), and of those whose class has more than 100 training samples, 20 to "
    "100, or fewer. Throughput and memory are in each training's results.json.",
    tail_in_words="few-shot",
    alpha="is not used",
)
KINDS = {kind.task: kind for kind in (CLASSIFICATION, DETECTION, SCALING)}


def kind_of(described: Mapping[str, Any]) -> Kind:
    """Of a config or a summary, by its ``task``; without one it is of classification.

    Raises:
        UserError: there is no such task.
    """
    task = str(described.get("task", CLASSIFICATION.task))
    if task not in KINDS:
        raise unknown("task", task, KINDS)
    return KINDS[task]
