"""Bars on a terminal, and nothing of them elsewhere."""

from __future__ import annotations

from io import StringIO

import pytest
import rich
from rich.console import Console
from tde_trainer.progress import Reporter, watched


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_of_images_stands_below_that_of_epochs(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=StringIO(), force_terminal=terminal, width=100)
    monkeypatch.setattr(rich, "_console", console)
    with Reporter(console, 2) as reporter:
        reporter.start_cell("linear seed 0", 1)
        assert list(watched(iter("abc"), "images", 3)) == ["a", "b", "c"]
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert ("images" in shown) is terminal and ("linear seed 0" in shown) is terminal
    if terminal:
        line_above = shown[: shown.rindex("images")].rsplit("\n", 2)[-2]
        assert "linear seed 0" in line_above
