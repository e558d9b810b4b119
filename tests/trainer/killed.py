"""Trainings that are killed at random moments and begun again until they are done, and what they leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tde_trainer.files import is_partial
from torch import Tensor

# Processes are forked from one that has imported everything and computed nothing: a start takes no seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["imported"])

RUN, OUTPUT = "run", "output.txt"
PATIENCE = 300.0  # seconds, of a training that nobody kills
WHILE_WRITING = 0.4  # share of the kills
# What may differ between two trainings of the same: how long they took, and what memory they met
MEASURED = {"wall_time_s", "images_per_second", "seconds", "step_s", "samples_per_second", "ranks"}


@dataclass(frozen=True)
class Outcome:
    """Of killing trainings."""

    kills: int  # that met a running training
    while_writing: int  # of these, those that met a half-written file
    finished: list[Path]  # folders of the trainings that came to their end all the same


def _command(arguments: Sequence[str], folder: Path) -> None:
    os.setsid()  # a group of processes, data loaders' workers among them, that is killed as one
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not begun by a server of forks
    os.chdir(folder)
    with open(OUTPUT, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from tde_trainer.app import app

    app([*arguments, f"out={RUN}", "resume=true"])


def _started(arguments: Sequence[str], folder: Path) -> BaseProcess:
    folder.mkdir(parents=True, exist_ok=True)
    process = CONTEXT.Process(target=_command, args=(arguments, folder))
    process.start()
    return process


def train(arguments: Sequence[str], folder: Path) -> float:
    """Train undisturbed, in a process of its own, in ``folder``/run; the seconds that it took."""
    first = CONTEXT.Process(target=os.getpid)  # what is imported once is no part of them
    first.start()
    first.join()
    began = time.monotonic()
    process = _started(arguments, folder)
    process.join(PATIENCE)
    assert process.exitcode == 0, (process.exitcode, (folder / OUTPUT).read_text())
    return time.monotonic() - began


def kill_until(kills: int, arguments: Sequence[str], folder: Path, seconds: float, rng: random.Random) -> Outcome:
    """Train and kill until ``kills`` have met a running training, each begun again until it is done.

    Args:
        kills: by SIGKILL, of the whole group of processes, at moments between start and end; some of them the moment
            that a file is seen to be half written.
        arguments: of `tde`.
        folder: a training is in each of its folders.
        seconds: that the training takes undisturbed.
        rng: of the moments.
    """
    met, writing, begun, finished = 0, 0, 0, []
    while met < kills or begun > len(finished):
        begun, here = len(finished) + 1, folder / str(len(finished))
        process = _started(arguments, here)
        if met < kills:
            seen = _wait(process, here, rng.uniform(0, seconds), rng.random() < WHILE_WRITING)
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()  # before it had a group
            process.join()
            met += process.exitcode == -signal.SIGKILL
            writing += seen and process.exitcode == -signal.SIGKILL
        process.join(PATIENCE)
        assert process.exitcode in (0, -signal.SIGKILL), (process.exitcode, (here / OUTPUT).read_text())
        if process.exitcode == 0:
            finished.append(here)
    return Outcome(met, writing, finished)


def _wait(process: BaseProcess, folder: Path, seconds: float, for_writing: bool) -> bool:
    """So long, and then until a file is half written, if that is asked for; whether one is."""
    process.join(seconds)
    while for_writing and process.exitcode is None:
        if any(map(is_partial, (folder / RUN).rglob(".*"))):
            return True
    return False


def left(run: Path) -> dict[str, Any]:
    """What a run left, by file: its checkpoints' bits, its figures, and of other files that they are there."""
    return {str(file.relative_to(run)): _content(file) for file in sorted(run.rglob("*")) if file.is_file()}


def _content(file: Path) -> Any:
    if file.suffix == ".pt":
        return _bits(torch.load(file, weights_only=True))
    if file.suffix in (".json", ".jsonl"):
        return [_figures(json.loads(line)) for line in _documents(file)]
    return ...


def _documents(file: Path) -> list[str]:
    text = file.read_text()
    return text.splitlines() if file.suffix == ".jsonl" else [text]


def _figures(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _figures(value) for key, value in node.items() if key not in MEASURED}
    return [_figures(item) for item in node] if isinstance(node, list) else node


def _bits(node: Any) -> Any:
    if isinstance(node, Tensor):
        return (
            node.dtype,
            tuple(node.shape),
            node.contiguous().view(torch.uint8).numpy().tobytes() if node.dim() else node,
        )
    return {key: _bits(value) for key, value in node.items() if key not in MEASURED}
