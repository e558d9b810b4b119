"""The commands of `tde study`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tde_trainer.study.toy_report import run_toy, toy_table

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
    options = {"--seeds": seeds, "--out": out, "--page": page}
    given = [str(part) for option in options.items() if option[1] is not None for part in option]
    console = Console()
    results = run_toy(seeds, out, page, shlex.join(["tde", "study", "toy", *given]))
    for name, kind in results["features"].items():
        console.print(toy_table(name, kind))
    console.print(f"page: {page or out / 'page.md'}", highlight=False, soft_wrap=True)
