"""One tiny run, made once through the command line, that the tests look at and never change."""

from __future__ import annotations

from pathlib import Path

import pytest
from tde_trainer.app import app
from trainer_tools import TINY, Tde
from typer.testing import CliRunner, Result


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
