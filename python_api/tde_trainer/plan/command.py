"""`tde plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tde_trainer.errors import UserError, unknown
from tde_trainer.files import dumps

if TYPE_CHECKING:
    from tde_trainer.plan.measure import Measured
    from tde_trainer.plan.model import Problem
    from tde_trainer.plan.step import Plan

# Of an H100 in 1e12/s, dense: a float32 product in float32, others in 16 bits.
TERAFLOPS = {"float32": 67.0, "bfloat16": 989.0, "float16": 989.0}


def plan(
    classes: Annotated[int, typer.Option(min=1, help="C, of all ranks together.")],
    dim: Annotated[int, typer.Option(min=1, help="D, channels of a feature.")],
    batch: Annotated[int, typer.Option(min=1, help="Of all ranks together.")],
    gpus: Annotated[int, typer.Option(min=1, help="Ranks. With --measure: those of the job.")] = 1,
    data_parallel: Annotated[int, typer.Option(min=1, help="How often the classes are held: a mesh of two.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="K.")] = 2,
    dtype: Annotated[str, typer.Option(help="Of weights and features: float32, bfloat16 or float16.")] = "float32",
    sample_rate: Annotated[float, typer.Option(help="Share of a shard's classes that a step looks at.")] = 1.0,
    targets: Annotated[int, typer.Option(min=1, max=2, help="Labels of a feature; 2 with mixup.")] = 1,
    optimizer: Annotated[str, typer.Option(help="sgd, with momentum, or adam.")] = "sgd",
    backend: Annotated[str, typer.Option(help="nccl, for GPUs, or gloo, for CPUs.")] = "nccl",
    bandwidth: Annotated[
        float, typer.Option(min=1e-9, help="GB/s that a rank sends; default: a network of 400 Gbit/s.")
    ] = 50.0,
    memory_bandwidth: Annotated[
        float, typer.Option(min=1e-9, help="GB/s; default: of an H100 (SXM). An H200 has 4800.")
    ] = 3350.0,
    flops: Annotated[
        float | None, typer.Option(min=1e-9, help="TFLOP/s; default: an H100's peak, 989 in 16 bits, 67 in float32.")
    ] = None,
    memory: Annotated[float, typer.Option(min=1e-9, help="GB of a device; an H200 has 141.")] = 80.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    measured: Annotated[
        bool, typer.Option("--measure", help="Under torchrun, on CPUs: also take steps and count.")
    ] = False,
) -> None:
    """Print what a rank of a class-parallel head holds, sends and waits for in a training step.

    docs/scaling.md has the formulas and their limits. The network before the head is not counted.

    [bold]Examples[/bold]

      tde plan --classes 100_000_000 --dim 512 --batch 65536 --gpus 64

      torchrun --nproc-per-node 2 -m tde_trainer plan --classes 100_000 --dim 128 --batch 1024 --measure
    """
    from tde_trainer.plan.model import DTYPES, STATES, Machine, Problem
    from tde_trainer.plan.step import plan_step
    from tde_trainer.ranks import ON_CPU, process

    for what, given, known in (
        ("dtype", dtype, DTYPES),
        ("optimizer", optimizer, STATES),
        ("backend", backend, ("nccl", "gloo")),
    ):
        if given not in known:
            raise unknown(f"--{what}", given, known)
    if not 0 < sample_rate <= 1:
        raise UserError(f"--sample-rate must be above 0 and at most 1, got {sample_rate:g}")
    if measured:
        if not ON_CPU:
            raise UserError("--measure counts what gloo sends between CPUs; this machine has a GPU")
        gpus, backend = process().num_processes, "gloo"
    try:
        problem = Problem(classes, dim, batch, gpus, data_parallel, heads, dtype, sample_rate, targets, optimizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    speed = flops or TERAFLOPS[dtype]
    machine = Machine(backend, bandwidth * 1e9, memory_bandwidth * 1e9, speed * 1e12, memory * 1e9)
    planned = plan_step(problem, machine)
    counted = _counted(problem) if measured else None
    if not process().is_main_process:
        return
    if as_json:
        record = {"problem": asdict(problem), "machine": asdict(machine), **planned.record()}
        typer.echo(dumps({**record, "measured": counted and asdict(counted)}, indent=1))
        return
    _show(Console(), problem, planned, counted)


def _counted(problem: Problem) -> Measured:
    from torch import distributed

    from tde_trainer.plan.measure import measure

    if not distributed.is_initialized():
        raise UserError("--measure needs processes: torchrun --nproc-per-node 2 -m tde_trainer plan ... --measure")
    return measure(problem)


def _show(console: Console, problem: Problem, planned: Plan, counted: Measured | None) -> None:
    console.print(
        f"{problem.held:,} classes of {problem.classes:,} on a rank, {problem.looked_at:,} in a step; "
        f"{problem.own_rows:,} features of its own among {problem.rows:,}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table("held", planned.memory, in_bytes))
    console.print(_table("sent in a step", planned.wire, in_bytes))
    console.print(_table("a step", planned.seconds, in_seconds))
    alone = ", ".join(f"{name} {in_seconds(value)}" for name, value in planned.alone.items())
    console.print(f"each alone: {alone}; the limit is {planned.limit}", highlight=False, soft_wrap=True)
    if not planned.fits:
        console.print("it does not fit in the device's memory", highlight=False, soft_wrap=True)
    if counted is not None:
        console.print(
            f"measured: {in_bytes(counted.memory)} held, {in_bytes(counted.forward)} sent in the forward, "
            f"{in_bytes(counted.backward)} in the backward",
            highlight=False,
            soft_wrap=True,
        )


def _table(title: str, parts: Mapping[str, Any], in_words: Any) -> Table:
    from tde_trainer.table import dense

    table = dense(None, [title], [""])
    for name, value in parts.items():
        table.add_row(name, in_words(value))
    table.add_row("in all", in_words(sum(parts.values())))
    return table


def in_bytes(value: float) -> str:
    """``"1.64 GB"``, of powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def in_seconds(value: float) -> str:
    """``"12.3 ms"``."""
    return f"{1000 * value:,.3g} ms" if value < 1 else f"{value:,.3g} s"
