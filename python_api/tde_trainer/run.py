"""A whole run: every method with every seed, each in its own folder, then the summary and the report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

import tde_kernels
from tde_trainer import results
from tde_trainer.device import check_trainable, cpu_threads, make_accelerator
from tde_trainer.epochs import Cell
from tde_trainer.files import dumps, write_atomic
from tde_trainer.progress import Reporter
from tde_trainer.ranks import together
from tde_trainer.report import how_made, write_report
from tde_trainer.run_folder import run_folder
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
    accelerator = make_accelerator(config.precision)
    with together():
        if accelerator.is_local_main_process:  # once, not by every process
            task.fetch()
    with ExitStack() as until_done:
        # Whatever can be wrong with the recipe shows here, before anything is written.
        with together():
            check_trainable(config, accelerator)
            counts = task.check(accelerator)
            if accelerator.is_main_process:
                until_done.enter_context(run_folder(run, config, command))
        return _train_all(run, config, task, counts, accelerator, console)


def _train_all(
    run: Path, config: RunConfig, task: Task[Any], counts: Tensor, accelerator: Accelerator, console: Console
) -> Path:
    console.quiet = console.quiet or not accelerator.is_main_process
    shown = counts_in_words(counts.tolist())
    console.print(f"{task.data_name}, training images per class: {shown}", highlight=False, soft_wrap=True)
    cells = [Cell(run, method, seed, config) for method in config.methods for seed in config.seeds]
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
