"""Shared by the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable

from typer.testing import Result

TINY = ["train.epochs=2", "model.width=4", "model.features=8", "data.val_per_class=5", "head.alpha_steps=7"]

Tde = Callable[..., Result]
