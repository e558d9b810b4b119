"""Tiny runs, made once through the command line, that the tests look at and never change."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import tde_trainer
from tde_trainer.app import app
from tde_trainer.detection.shapes import write_shapes
from trainer_tools import TINY, TINY_DETECTOR, Tde
from typer.testing import CliRunner, Result

# Commands import what they run when they run: what a test had patched just then, they would keep for all tests.
for _module in pkgutil.walk_packages(tde_trainer.__path__, "tde_trainer."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)


@pytest.fixture(scope="session")
def tde() -> Tde:
    """The `tde` command, in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tde: Tde) -> Path:
    """Two methods, two seeds, two epochs."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    result = tde("train", "digits_lt", *TINY, "methods=[linear,deconfound]", "seeds=[0,1]", f"out={run}")
    assert result.exit_code == 0, result.output
    return run


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and annotations of shapes, for ``data.name=lvis``: 24 for training, 10 for validation and for the test."""
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, train_images=24, val_images=10, test_images=10, size=48)
    return root


@pytest.fixture(scope="session")
def tiny_detectors(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory, tde: Tde) -> Path:
    """A run of two methods, one seed and one epoch."""
    run = tmp_path_factory.mktemp("runs") / "detectors"
    result = tde("train", "shapes_lvis", *TINY_DETECTOR, f"data.root={tiny_shapes}", f"out={run}")
    assert result.exit_code == 0, result.output
    return run
