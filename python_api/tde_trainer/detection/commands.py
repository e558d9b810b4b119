"""`tde ap`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tde_trainer.detection.evaluation import evaluate
from tde_trainer.table import dense


def ap(
    annotations: Annotated[Path, typer.Argument(metavar="ANNOTATIONS", help="LVIS annotation file, v0.5 or v1.")],
    detections: Annotated[
        Path, typer.Argument(metavar="DETECTIONS", help="LVIS submission: {image_id, category_id, score, bbox, ...}.")
    ],
    kind: Annotated[str, typer.Option(help="Whether boxes (bbox) or masks (segm) must overlap.")] = "bbox",
) -> None:
    """Print LVIS's average precision of detections, in %: equal to the official package's.

    Rare, common and frequent classes are those that the annotation file calls so. Both files may be gzipped.

    [bold]Example[/bold]

      tde ap lvis_v1_val.json detections.json --kind segm
    """
    measures = evaluate(annotations, detections, kind)
    table = dense(f"LVIS, {kind}, in %", [], list(measures))
    table.add_row(*("n/a" if math.isnan(value) else f"{100 * value:.1f}" for value in measures.values()))
    Console().print(table)
