"""The commands of `tde`.

Each imports what it runs when it runs: `--help` and the completion of a shell do not wait for torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import get_console
from rich.console import Console
from typer.core import TyperGroup

from tde_trainer.errors import UserError
from tde_trainer.files import dumps, write_atomic
from tde_trainer.gradcam.command import gradcam
from tde_trainer.plan.command import plan
from tde_trainer.posthoc import commands as posthoc
from tde_trainer.recipe import recipe_names, recipe_text
from tde_trainer.schema import HeadConfig
from tde_trainer.study.commands import study


class _Commands(TyperGroup):
    """Turns the user's errors into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train and examine classifiers and detectors on long-tailed data: de-confounded training and TDE inference.",
)
app.add_typer(study, name="study")
app.command()(posthoc.features)
app.command(name="fit-direction")(posthoc.fit_direction)
app.command()(gradcam)
app.command()(plan)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or of one training in it.")]
RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe (`tde recipes`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe; dots nest.")
    ] = None,
) -> None:
    """Train every method of a recipe with every seed, print the table and write a report.

    [bold]Examples[/bold]

      tde train digits_lt

      tde train digits_lt methods=\\[deconfound] seeds=\\[0,1,2] train.epochs=30 out=runs/short

      tde train digits_lt resume=true      [dim]# go on after an interruption[/dim]

      tde train digits_lt method=crt from=runs/digits_lt      [dim]# a second stage[/dim]

      torchrun --nproc-per-node gpu -m tde_trainer train digits_lt      [dim]# every GPU[/dim]
    """
    from tde_trainer import results
    from tde_trainer.config import load_recipe
    from tde_trainer.ranks import together
    from tde_trainer.run import train_run

    console = _console()
    with together():
        config = load_recipe(recipe, overrides or [])
    with _resumable():
        report = train_run(config, ["tde", "train", recipe, *(overrides or [])], console)
    _show(console, results.summarize(results.by_method(results.finished_cells(report.parent))))
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


@app.command()
def grid(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe (`tde recipes`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Axes, KEY=V1,V2,..., and changes to the recipe; dots nest."),
    ] = None,
) -> None:
    """Train de-confounded heads at every combination of settings, and compare them on validation data.

    Without an axis, at the settings of the paper's Table 6. Every network is read without TDE and at each head.alpha,
    by default 2.5,3.0,3.5. RUN/grid.json keeps the table.

    [bold]Examples[/bold]

      tde grid imagenet_lt data.root=DIR

      tde grid digits_lt head.num_heads=1,2,4 head.tau=8,16 head.alpha=0.5,1.0,1.5

      tde grid digits_lt methods=\\[linear] train.weight_decay=5e-4,5e-3 resume=true
    """
    from tde_trainer.grid import grid_table, run_grid
    from tde_trainer.grid import plan as plan_grid
    from tde_trainer.ranks import together
    from tde_trainer.results import GRID

    console = _console()
    with together():
        planned = plan_grid(recipe, overrides or [])
    with _resumable():
        summary = run_grid(planned, ["tde", "grid", recipe, *(overrides or [])], console)
    console.print(grid_table(summary))
    console.print(f"grid: {Path(planned.config.out) / GRID}", highlight=False, soft_wrap=True)


@app.command(name="eval")
def evaluate(
    run: RunPath,
    alpha: Annotated[
        str | None, typer.Argument(metavar="[alpha=VALUE]", help="TDE strength; default: the one of the run.")
    ] = None,
) -> None:
    """Recompute a run's test accuracy, or average precision, from its checkpoints, at its own alpha or at another.

    [bold]Examples[/bold]

      tde eval runs/digits_lt

      tde eval runs/digits_lt/deconfound/seed0 alpha=1.5
    """
    from tde_trainer.again import evaluate_runs, parse_alpha

    _show(_console(), evaluate_runs(run, parse_alpha(alpha)))


@app.command()
def sweep(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Directory of a run or a training; or a file of features.")
    ],
    head: Annotated[
        Path | None, typer.Option(help="With a file of features: the head that `tde fit-direction` wrote.")
    ] = None,
    maximum: Annotated[float | None, typer.Option("--max", help="Largest alpha; default: the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Number of alphas; default: the recipe's.")] = None,
) -> None:
    """Print accuracy against alpha, recomputed from checkpoints, and write RUN/sweep.json; or of a file of features.

    Of detectors it is average precision, by default at the recipe's head.alphas; every alpha reads all images anew.

    [bold]Examples[/bold]

      tde sweep runs/digits_lt --max 3 --steps 13

      tde sweep features.npz --head tde_head.safetensors
    """
    from tde_trainer.again import grid_of, sweep_run
    from tde_trainer.posthoc.fit import sweep_dump
    from tde_trainer.table import alpha_table

    if run.is_dir() if head is not None else run.is_file():
        raise UserError(f"--head goes with a file of features, and a file of features with --head; got {run}")
    console = _console()
    if head is not None:
        curves = sweep_dump(run, head, grid_of(HeadConfig(), maximum, steps))
    else:
        path, curves = sweep_run(run, maximum, steps)
    for name, curve in curves.items():
        console.print(alpha_table(name, curve))
    if head is None:
        console.print(f"curves: {path}", highlight=False, soft_wrap=True)


@app.command()
def report(
    runs: RunPaths,
    out: Annotated[
        Path | None, typer.Option(help="Default: RUN/report.html; for several runs, ./report/report.html.")
    ] = None,
) -> None:
    """Write the report of a run anew, or one that sets several runs side by side.

    [bold]Example[/bold]

      tde report runs/a runs/b --out compare/report.html
    """
    from tde_trainer.report import write_report

    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report/report.html"))
    console = _console()
    _show(console, write_report(runs, path))
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


@app.command()
def table(
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="Of the paper's table, 2 to 10.")],
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, or results.json of runs; for 6, grids.")
    ],
) -> None:
    """Print our figures beside a table of the paper; on other data than the paper's, their order.

    [bold]Examples[/bold]

      tde table 3 runs/cifar10_lt runs/cifar100_lt

      tde table 2 runs/imagenet_lt runs/imagenet_lt_stage_two

      tde table 4 runs/lvis_v05 runs/lvis_v1

      tde table 6 runs/imagenet_lt_grid
    """
    from tde_trainer import beside
    from tde_trainer.compare import compare
    from tde_trainer.published import published_table

    published, console = published_table(number), _console()
    comparisons = compare(runs, published)
    console.print(f"{published.title}, in %: mean ± sample std over seeds", highlight=False)
    for comparison in comparisons:
        console.print(f"\n{comparison.setting}; {beside.caption(comparison)}", highlight=False)
        console.print(beside.table(comparison))


@app.command()
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
    from tde_trainer.detection.evaluation import evaluate
    from tde_trainer.table import dense

    measures = evaluate(annotations, detections, kind)
    shown = dense(f"LVIS, {kind}, in %", [], list(measures))
    shown.add_row(*("n/a" if math.isnan(value) else f"{100 * value:.1f}" for value in measures.values()))
    _console().print(shown)


@app.command()
def page(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="results.json of runs, under their names.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("docs/results.md"),
) -> None:
    """Write a page of results in markdown, a section for each file; a NAME.md beside NAME.json is its remark.

    [bold]Example[/bold]

      tde page docs/results/digits_lt.json docs/results/cifar10_lt.json
    """
    from tde_trainer.pages import write_results_page

    write_results_page(files, out)
    typer.echo(f"page: {out}")


@app.command()
def speed(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe (`tde recipes`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe; dots nest.")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each measurement, after two others.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
) -> None:
    """Measure training on synthetic images: images a second, and the head's share of a step.

    [bold]Example[/bold]

      tde speed imagenet_lt train.batch_size=512
    """
    from tde_trainer.config import load_config
    from tde_trainer.run import versions
    from tde_trainer.speed import measure_speed

    measured = measure_speed(load_config(recipe, overrides or []), classes, steps)
    if out is not None:
        write_atomic(out, dumps({**measured.record(), "versions": versions()}, indent=1) + "\n")
    typer.echo(
        f"{measured.method} on {measured.model}, {measured.image_size} x {measured.image_size} synthetic images, "
        f"batch {measured.batch_size}, {measured.precision}, {measured.num_classes} classes, {measured.device}"
    )
    typer.echo(
        f"{measured.images_per_second:,.1f} images/s; a step {measured.step_ms:,.1f} ms, of which the head "
        f"{measured.head_ms:.2f} ms ({measured.head_share:.2%})"
    )


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    for name in recipe_names():
        typer.echo(f"{name}: {recipe_text(name).splitlines()[0].removeprefix('# ')}")


@app.command()
def info() -> None:
    """Show versions, what was built, and which backend each op would take."""
    import tde_kernels

    typer.echo(str(tde_kernels.info()))


def _console() -> Console:
    """One for all bars and tables; in a file or a pipe no window breaks a line of many columns."""
    console = get_console()
    if not console.is_terminal:
        console.width = 160
    return console


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        from tde_trainer.ranks import process

        if process().is_main_process:
            typer.echo("interrupted; the same command with resume=true goes on", err=True)
        raise typer.Exit(130) from None


def _show(console: Console, summary: dict[str, Any]) -> None:
    from tde_trainer.table import accuracy_table, lift_lines

    console.print(accuracy_table(summary))
    for line in lift_lines(summary):
        console.print(line, highlight=False, soft_wrap=True)
