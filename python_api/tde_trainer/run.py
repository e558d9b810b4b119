"""A whole run: every method with every seed, each in its own folder, then the summary and the report."""

from __future__ import annotations

import platform
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

import tde_kernels
from tde_trainer import results
from tde_trainer.config import changed_keys
from tde_trainer.device import check_trainable, cpu_threads, make_accelerator
from tde_trainer.epochs import Cell
from tde_trainer.errors import UserError
from tde_trainer.files import dumps, write_atomic
from tde_trainer.progress import Reporter
from tde_trainer.ranks import together
from tde_trainer.report import how_made, write_report
from tde_trainer.schema import RunConfig
from tde_trainer.table import counts_in_words
from tde_trainer.task import Task
from tde_trainer.tasks import task_of

RECORDED = ("torch", "torchvision", "accelerate", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions that decide the numbers."""
    known = {"python": platform.python_version(), "tde_kernels": tde_kernels.__version__}
    for package in RECORDED:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "unknown"
    return known


def train_run(config: RunConfig, command: Sequence[str], console: Console) -> Path:
    """Train what is not yet trained, and write results.json, plots and report.html.

    Args:
        config: a checked recipe.
        command: the command line, kept for the report.
        console: where to print.

    Returns:
        The report's path.

    Raises:
        UserError: the run directory is in use or was made with another config; the recipe can't be built, or not
            trained by this device or that many processes.
    """
    run, task = Path(config.out), task_of(config)
    cells = [Cell(run, method, seed) for method in config.methods for seed in config.seeds]
    accelerator = make_accelerator(config.precision)
    with together():
        if accelerator.is_local_main_process:  # once, not by every process
            task.fetch()
    # Whatever can be wrong with the recipe shows here, before anything is written.
    with together():
        check_trainable(config, accelerator)
        counts = task.check(accelerator)
        if accelerator.is_main_process:
            _open(run, config, command)

    console.quiet = console.quiet or not accelerator.is_main_process
    shown = counts_in_words(counts.tolist())
    console.print(f"{task.data_name}, training images per class: {shown}", highlight=False, soft_wrap=True)
    epochs = {method: task.epochs(method) for method in config.methods}
    with (
        cpu_threads(config.train.threads),
        Reporter(console, sum(epochs.values()) * len(config.seeds)) as reporter,
    ):
        for cell in cells:
            if (cell.directory / results.FILE).exists():
                reporter.start_cell(cell.name, epochs[cell.method])
                reporter.line(f"{cell.name}: already finished")
                continue
            _train(cell, config, task, accelerator, reporter)
    with together():
        if accelerator.is_main_process:
            summary = write_report([run], run / "report.html")
            write_atomic(run / results.FILE, dumps({**summary, **how_made(run)}, indent=1) + "\n")
    return run / "report.html"


def _train(cell: Cell, config: RunConfig, task: Task[Any], accelerator: Accelerator, reporter: Reporter) -> None:
    measured = task.train(cell, accelerator, lambda done: reporter.start_cell(cell.name, done), reporter.epoch_done)
    accelerator.free_memory()
    described = {"method": cell.method, "seed": cell.seed, "config": asdict(config), "versions": versions()}
    with together():
        if accelerator.is_main_process:
            write_atomic(cell.directory / results.FILE, dumps({**described, **measured}, indent=1) + "\n")
    alpha = f", alpha {measured['alpha']['value']:g}" if measured["alpha"] else ""
    reporter.line(f"{cell.name}: {task.in_words(measured)}{alpha} ({measured['wall_time_s']:.1f} s)")


def _open(run: Path, config: RunConfig, command: Sequence[str]) -> None:
    """Make the run directory, or check that this is the run to resume."""
    settings: dict[str, Any] = {"config": asdict(config), "command": shlex.join(command)}
    if run.exists() and not run.is_dir():
        raise UserError(f"out={run} is a file")
    in_use = run.is_dir() and any(run.iterdir())
    if in_use and config.overwrite:
        if not (run / results.SETTINGS).exists():
            raise UserError(f"{run} is not a run (it has no {results.SETTINGS}): not overwriting it")
        shutil.rmtree(run)
    elif in_use and not config.resume:
        raise UserError(f"{run} is not empty: resume=true goes on with it, overwrite=true starts anew")
    elif in_use:
        changed = changed_keys(results.settings(run)["config"], asdict(config))
        if changed:
            raise UserError(f"cannot resume {run} with another config; changed: {', '.join(changed)}")
        return
    write_atomic(run / results.SETTINGS, dumps(settings, indent=1) + "\n")
