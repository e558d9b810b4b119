"""The command `tde gradcam`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def gradcam(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs, each method's first seed, or single trainings.")
    ],
    images: Annotated[int, typer.Option(help="How many test images to show, at most.")] = 6,
    out: Annotated[Path, typer.Option(help="The figure, a PNG.")] = Path("gradcam.png"),
) -> None:
    """Draw what networks look at in the same test images, each without TDE and with (Figure 5 of the paper).

    Shown are few-shot test images on which TDE changes a prediction.

    [bold]Examples[/bold]

      tde gradcam runs/cifar10_lt

      tde gradcam runs/cifar10_lt/linear/seed0 runs/cifar10_lt/deconfound/seed0 --images 4
    """
    from tde_trainer.gradcam.run import draw_gradcam

    console = Console()
    console.print(draw_gradcam(runs, images, out), highlight=False, soft_wrap=True)
    console.print(f"figure: {out}", highlight=False, soft_wrap=True)
