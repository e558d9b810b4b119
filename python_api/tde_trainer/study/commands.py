"""The commands of `tde study`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

study = typer.Typer(no_args_is_help=True, help="Put a claim of the paper to the test.")


@study.callback()
def _study() -> None:
    """Put a claim of the paper to the test."""


@study.command()
def toy(
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for page.md, toy.png and toy.json.")] = Path("runs/toy"),
    page: Annotated[
        Path | None, typer.Option(help="Also write this page, and images/toy.png and results/toy.json beside it.")
    ] = None,
) -> None:
    """Train the one-dimensional example of the paper's Figure 7: conventional, re-balanced twice, and TDE.

    [bold]Example[/bold]

      tde study toy --seeds 3
    """
    from tde_trainer.study.toy_report import run_toy, toy_table

    options = {"--seeds": seeds, "--out": out, "--page": page}
    given = [str(part) for option in options.items() if option[1] is not None for part in option]
    console = Console()
    results = run_toy(seeds, out, page, shlex.join(["tde", "study", "toy", *given]))
    for name, kind in results["features"].items():
        console.print(toy_table(name, kind))
    console.print(f"page: {page or out / 'page.md'}", highlight=False, soft_wrap=True)


@study.command()
def momentum(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe (`tde recipes`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe; dots nest.")
    ] = None,
    mu: Annotated[
        list[float] | None, typer.Option(help="A momentum; give several. Default: 0 0.5 0.9 0.95 0.98.")
    ] = None,
    fixed_lr: Annotated[
        bool, typer.Option(help="Keep the learning rate, not the size of a step in the long run.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(help="Also write this page, and its images/ and results/momentum.json beside it.")
    ] = None,
) -> None:
    """Train a recipe at several momenta, and draw what they do to features and to the tail (Figures 1b, 1c, 4, 6).

    [bold]Example[/bold]

      tde study momentum cifar10_lt data.root=DIR methods=\\[linear,deconfound]

      tde study momentum digits_lt resume=true      [dim]# go on after an interruption[/dim]
    """
    from tde_trainer.config import load_config
    from tde_trainer.study import momentum_report
    from tde_trainer.study.momentum import MUS, collect, train_all

    console = Console()
    config = load_config(recipe, [f"out=runs/{Path(recipe).stem}_momentum", *(overrides or [])])
    given = [f"--mu={one:g}" for one in mu or []] + ["--fixed-lr"] * fixed_lr
    command = ["tde", "study", "momentum", recipe, *(overrides or []), *given]
    mus = sorted(set(mu or MUS))
    train_all(config, mus, command, console, fixed_lr=fixed_lr)
    out, trained = Path(config.out), collect(config, mus)
    summary = momentum_report.write(trained, config.train.momentum, shlex.join(command), out, page, fixed_lr=fixed_lr)
    console.print(momentum_report.momentum_table(summary))
    console.print(f"page: {page or out / 'page.md'}", highlight=False, soft_wrap=True)
