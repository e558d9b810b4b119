"""Several processes, as `torchrun` or `accelerate launch` start them: they fail together, and one says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tde_trainer.errors import UserError

_T = TypeVar("_T")
# Without it accelerate takes the processes that torchrun starts on a machine without GPUs for strangers.
ON_CPU = not torch.accelerator.is_available()


def process() -> PartialState:
    """This process: its rank, and how many there are."""
    return PartialState(cpu=ON_CPU)


def leave() -> None:
    """End this process's part in the group, if it has one: left to the interpreter's end, torch complains or aborts."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """All processes leave the block at the same time; where one of them meets a `UserError`, none goes on.

    It is for what may fail on one process alone, such as writing, while the others would wait for it, and for what
    fails on every process, which should be said once. The main process raises the error. The others leave without a
    word and with exit code 0: at any other a launcher ends the job, perhaps before the main process has spoken.

    Raises:
        UserError: that of the first process that met one.
    """
    met: list[str | None] = [None]
    try:
        yield
    except UserError as error:
        met = [str(error)]
    main = process().is_main_process
    for message in gather_object(met):
        if message is not None:
            raise UserError(message) if main else SystemExit(0)


def of_main(compute: Callable[[], _T]) -> _T:
    """What ``compute`` returns on the main process, the one that runs it, told to all.

    Raises:
        UserError: that of the main process.
    """
    with together():
        found = [compute() if process().is_main_process else None]
    told: _T = broadcast_object_list(found)[0]
    return told


def on_main(items: list[_T]) -> list[_T]:
    """The items of all processes, in their order, on the main one; nothing elsewhere, where there may be no room."""
    if process().num_processes == 1:
        return items
    parts: list[list[_T]] = [[] for _ in range(process().num_processes)]
    torch.distributed.gather_object(items, parts if process().is_main_process else None)
    return list(chain.from_iterable(parts))
