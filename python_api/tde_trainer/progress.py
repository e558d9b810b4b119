"""What the user sees while training: a bar on a terminal, short plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, TypeVar

from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, track

SECONDS_BETWEEN_LINES = 30.0
_T = TypeVar("_T")


def watched(items: Iterable[_T], what: str, total: int) -> Iterable[_T]:
    """The items, with a bar on a terminal that stands below one that is there already."""
    return track(items, what, total, transient=True, disable=not get_console().is_terminal)


class Reporter:
    """Follows the epochs of a run over all of its cells.

    Args:
        console: where to print.
        epochs: epochs of the whole run, for the bar and the time left.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self._epochs, self._done, self._cell = console, epochs, 0, ""
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=epochs, speed="")

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start_cell(self, name: str, epochs_done: int) -> None:
        """A cell begins, or goes on after ``epochs_done`` epochs."""
        self._cell = name
        self._done += epochs_done
        self._bar.update(self._task, completed=self._done, description=name)

    def epoch_done(self, row: dict[str, Any]) -> None:
        """One epoch finished; ``row`` is its line of metrics.jsonl."""
        self._done += 1
        speed = f"loss {row['loss']:.3f}  {row['images_per_second']:,.0f} images/s  left"
        self._bar.update(self._task, completed=self._done, speed=speed)
        # A log file gets a sign of life from long trainings and nothing from short ones.
        if not self.console.is_terminal and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.line(f"{self._cell}: epoch {row['epoch']} loss {row['loss']:.3f} ({self._done}/{self._epochs} in all)")

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)
