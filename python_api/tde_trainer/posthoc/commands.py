"""`tde features` and `tde fit-direction`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from tde_trainer.errors import UserError, unknown
from tde_trainer.schema import SPLITS


def features(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or of one training in it.")],
    splits: Annotated[str, typer.Option(help="Which to keep, joined by commas.")] = ",".join(SPLITS),
) -> None:
    """Keep the features of every training beside its checkpoint, for all commands that need nothing else.

    [bold]Examples[/bold]

      tde features runs/imagenet_lt

      tde features runs/imagenet_lt/linear/seed0 --splits val,test
    """
    from tde_trainer import results
    from tde_trainer.feature_file import FILE
    from tde_trainer.trained import TrainedCell

    wanted = splits.split(",")
    for name in wanted:
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
    cells = results.finished_cells(run)
    for result in track(cells, "features", transient=True):
        TrainedCell(result).keep_features(*wanted)
        typer.echo(f"features: {result.directory / FILE}")


def fit_direction(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of a training, or a file of features (.npz, .safetensors).")
    ],
    weight: Annotated[
        Path | None, typer.Option(help="With a file of features: the checkpoint of the network that they come from.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Name of the classifier's weight in that checkpoint.")] = None,
    normalizer: Annotated[
        str | None,
        typer.Option(
            help="Of the head; default: as trained, else linear; the paper's with its code's checkpoints.",
            show_default=False,
        ),
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="K; default: as trained, else 1; or the paper's.")] = None,
    tau: Annotated[float | None, typer.Option(help="Temperature; default: as trained, else 1; or the paper's.")] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Of deconfound; default: as trained, else 0; or the paper's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The head's file; default: tde_head.safetensors beside.")] = None,
) -> None:
    """Add TDE to a trained network without training: fit the head direction, choose alpha, write the head.

    The direction is the mean of the training features, or the moving average in a checkpoint of the paper's published
    code. Alpha is the best on validation data; test data are reported alone.

    [bold]Examples[/bold]

      tde fit-direction runs/imagenet_lt/linear/seed0

      tde fit-direction features.npz --weight resnet50.pth --key fc.weight

      tde fit-direction features.npz --weight model.safetensors --normalizer deconfound --num-heads 2 --gamma 0.03125
    """
    from tde_trainer.posthoc.fit import Family, fit_cell, fit_dump
    from tde_trainer.posthoc.head_file import save_head
    from tde_trainer.table import accuracy_table, lift_lines

    family = Family(normalizer, num_heads, tau, gamma)
    if source.is_dir():
        if weight is not None or key is not None:
            raise UserError(f"--weight and --key go with a file of features; {source} is a folder")
        fitted = fit_cell(source, family)
    elif not source.exists():
        raise UserError(f"there is no such file or folder: {source}")
    elif weight is None:
        raise UserError(f"{source} is a file of features: --weight FILE names the checkpoint of its network")
    else:
        fitted = fit_dump(source, weight, key, family)
    path = out or fitted.out
    save_head(path, fitted.head)
    console, summary = Console(), fitted.summary()
    console.print(accuracy_table(summary))
    if fitted.reported != "test":
        console.print("There is no test split: these are the validation data by which alpha was chosen.")
    for line in lift_lines(summary):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"head: {path}", highlight=False, soft_wrap=True)
